# What echoserver.py builds on of websocket-server 0.6.4, which has no types of its own
import socket as socket_
import threading
from typing import Any, Callable, Optional

class WebsocketServer:
    address_family: int
    socket: socket_.socket
    host: str
    port: int
    id_counter: int
    thread: Optional[threading.Thread]
    _deny_clients: Any
    new_client: Callable[..., None]
    client_left: Callable[..., None]
    message_received: Callable[..., None]
    def __init__(self, host: str = ..., port: int = ..., loglevel: int = ..., key: Any = ..., cert: Any = ...) -> None: ...
    def server_bind(self) -> None: ...
    def server_close(self) -> None: ...
    def set_fn_new_client(self, fn: Callable[..., None]) -> None: ...
    def set_fn_client_left(self, fn: Callable[..., None]) -> None: ...
    def set_fn_message_received(self, fn: Callable[..., None]) -> None: ...
