"""HTTP response headers of the chat page and the server: one policy for both."""

SOURCES = {
    "default-src": "'self'",
    # Gradio's page starts from inline scripts and styles, and builds functions from strings
    "script-src": "'self' 'unsafe-inline' 'unsafe-eval'",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "media-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "connect-src": "'self'",
    "worker-src": "'self' blob:",
    "object-src": "'none'",
    "base-uri": "'self'",
    "form-action": "'self'",
    # a notebook shows the page in a frame: Jupyter from another port of this machine, VS Code from its own schemes
    "frame-ancestors": "'self' http://127.0.0.1:* http://localhost:* https://localhost:* vscode-webview: vscode-file:",
}
SECURITY_HEADERS = {
    b"content-security-policy": "; ".join(f"{name} {sources}" for name, sources in SOURCES.items()).encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
}


class SecurityHeaders:
    """ASGI middleware that adds SECURITY_HEADERS to every HTTP response: nothing is loaded from, or sent to, another
    origin; no response is taken for another type than it declares; no address is passed on. A header that the response
    has already stays as it is.

        app.add_middleware(SecurityHeaders)

    Args:
        app: the ASGI application.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                present = {name.lower() for name, _ in headers}
                missing = [(name, value) for name, value in SECURITY_HEADERS.items() if name not in present]
                message = {**message, "headers": [*headers, *missing]}
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
