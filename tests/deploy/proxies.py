"""nginx and Caddy with our snippets, on ports of their own: TLS with a certificate made for the run."""

import os
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from synthia_vllm.free_ports import free_port
from synthia_vllm.manifests.render import render
from synthia_vllm.settings import Settings
from tests.running import until
from tests.tools import needed

_MAIN = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; {user}
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    include {folder}/synthia.conf;
}}
"""


def snippets(port: int) -> dict[str, str]:
    """What an operator gets for a gateway at this port."""
    settings = Settings(port=port, deploy={"domain": "localhost"})  # type: ignore[arg-type]
    return render("systemd", settings, [])


def nginx_files(folder: Path, upstream_port: int, port: int) -> Path:
    """nginx's main file, around the snippet with other ports and another certificate."""
    _certificate(folder)
    text = snippets(upstream_port)["proxy/nginx.conf"].replace("/etc/synthia/tls", str(folder))
    text = text.replace("listen 80;", f"listen 127.0.0.1:{free_port()};")
    (folder / "synthia.conf").write_text(text.replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"))
    main = folder / "nginx.conf"
    main.write_text(_MAIN.format(folder=folder, user="user root;" if os.geteuid() == 0 else ""))
    return main


def caddy_file(folder: Path, upstream_port: int, port: int) -> Path:
    """The Caddyfile with our certificate in the place of one that Caddy would get."""
    _certificate(folder)
    text = snippets(upstream_port)["proxy/Caddyfile"]
    site = f"https://localhost:{port} {{\n\ttls {folder}/fullchain.pem {folder}/privkey.pem\n"
    head = "{\n\tadmin off\n\tauto_https disable_redirects\n\tskip_install_trust\n}\n"
    path = folder / "Caddyfile"
    path.write_text(head + text.replace("localhost {\n", site))
    return path


@contextmanager
def running(name: str, folder: Path, upstream_port: int) -> Iterator[tuple[str, ssl.SSLContext]]:
    """Its URL, and what trusts its certificate."""
    port = free_port()
    if name == "nginx":
        words = [needed("nginx", "nginx-light"), "-c", str(nginx_files(folder, upstream_port, port)), "-p", str(folder)]
    else:
        words = [needed("caddy", "caddy"), "run", "--adapter", "caddyfile"]
        words += ["--config", str(caddy_file(folder, upstream_port, port))]
    home = {"HOME": str(folder), "PATH": "/usr/bin:/usr/sbin"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=home)
    try:
        trusting = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
        until(lambda: _listens(port, process, folder), f"{name} listens", 20)
        yield f"https://localhost:{port}", trusting
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int, process: "subprocess.Popen[bytes]", folder: Path) -> bool:
    if process.poll() is not None:
        raise AssertionError((folder / "log").read_text())
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _certificate(folder: Path) -> None:
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost"]
    words += ["-keyout", str(folder / "privkey.pem"), "-out", str(folder / "fullchain.pem")]
    subprocess.run(words, check=True, capture_output=True)
