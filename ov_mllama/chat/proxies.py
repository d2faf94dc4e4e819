"""Proxy variables of the environment, corrected for programs that connect to themselves over HTTP."""

import os

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def bypass_proxy_for_loopback(*hosts: str) -> None:
    """Add this machine's own addresses to `no_proxy`, and rename `socks://` proxies to `socks5://`.

    Gradio requests its own page over HTTP when it starts, Ray its own processes; with `http_proxy` set and no
    `no_proxy`, such requests would go to the proxy (gradio#4046). Desktops set `all_proxy=socks://...`, which httpx
    rejects. Call it before importing Gradio, which reads `all_proxy` then.

    Args:
        hosts: more names of this machine, such as the address that a page listens on.
    """
    # httpx, requests and gRPC differ in which spelling they read first
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name.strip() for name in listed.split(",") if name.strip()]
    names += [host for host in (*LOOPBACK, *hosts) if host and host not in names]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(names)
    for name, value in list(os.environ.items()):
        if name.lower().endswith("_proxy") and value.lower().startswith("socks://"):
            os.environ[name] = "socks5" + value[len("socks") :]
