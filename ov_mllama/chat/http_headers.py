"""HTTP response headers of the chat page and the server: one policy for both."""

SOURCES = {
    "default-src": "'self'",
    # Gradio's page needs inline scripts and styles, and `eval`
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
    # notebooks frame the page: Jupyter from another port of this machine, VS Code from its own schemes
    "frame-ancestors": "'self' http://127.0.0.1:* http://localhost:* https://localhost:* vscode-webview: vscode-file:",
}
SECURITY_HEADERS = {
    b"content-security-policy": "; ".join(f"{name} {sources}" for name, sources in SOURCES.items()).encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
}


class SecurityHeaders:
    """ASGI middleware that adds SECURITY_HEADERS to every HTTP response: no requests to other origins, no type
    sniffing, no referrer. Headers that the response has already stay.

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
