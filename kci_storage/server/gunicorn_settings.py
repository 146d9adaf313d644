# SPDX-License-Identifier: LGPL-2.1-or-later
"""All settings of gunicorn: which an operator may change, and which this server refuses, and why.

The server must not silently ignore a setting that gunicorn would respect. So each is in one of the tables below; a
setting that a later gunicorn adds is refused until it is added here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# These work as gunicorn's documentation says.
WORKING = frozenset(
    {
        # the start
        "config", "wsgi_app", "bind", "backlog", "chdir", "check_config", "print_config", "pidfile", "proc_name",
        "default_proc_name", "pythonpath", "raw_env", "umask", "worker_tmp_dir", "spew",
        "daemon", "enable_stdio_inheritance",
        # life cycle of workers
        "timeout", "graceful_timeout", "keepalive", "reload", "reload_engine", "reload_extra_files",
        # gunicorn's own messages; the access log is this server's
        "errorlog", "loglevel", "capture_output", "logger_class", "logconfig", "logconfig_dict", "logconfig_json",
        # the syntax of requests
        "limit_request_fields", "limit_request_field_size", "permit_obsolete_folding", "strip_header_spaces",
        "permit_unconventional_http_method", "permit_unconventional_http_version", "casefold_http_method",
        "header_map",
        # hooks; a replacement for one of kci_storage.server.hooks must call the original
        "on_starting", "on_reload", "when_ready", "pre_fork", "post_fork", "post_worker_init", "worker_int",
        "worker_abort", "pre_exec", "child_exit", "worker_exit", "nworkers_changed", "on_exit",
        # gunicorn's control socket, which is off by default
        "control_socket", "control_socket_mode", "control_socket_disable",
    }
)  # fmt: skip

_OF_CONFIGURATION = "set it in the configuration's [server]"
_TLS = "for TLS, set certfile and keyfile in the configuration's [server]"
_PROXY = "set trusted_proxies in the configuration's [server]"
_ACCESS_LOG = "each request is logged on standard error already"
_SYSLOG = "the log goes to standard error; let systemd or logger(1) pass it on"
_STATSD = "the server's figures are at /metrics"
_USER = "start the whole server as the user that it is to run as"
_HTTP1 = "the server speaks HTTP/1.1; let a proxy in front speak HTTP/2"
_WSGI = "it is for ASGI, and this is a WSGI server"
_PASTE = "the application is kci-storage's own"
_DIRTY = "the server has no use for such workers"
_RESTARTS = "a worker that ends is replaced only when its last transfer has ended"

# These keep the value that kci_storage.server.settings gives them; the text says what to do instead.
KEPT: Mapping[str, str] = {
    "workers": _OF_CONFIGURATION,
    "threads": _OF_CONFIGURATION,
    "worker_class": "the server needs its own",
}

# These keep gunicorn's default; the text says why, or what to do instead.
REFUSED: Mapping[str, str] = {
    "http_parser": "the other one accepts bare line feeds",
    "limit_request_line": "it follows from how long a key may be",
    "forwarded_allow_ips": _PROXY,
    "secure_scheme_headers": _PROXY,
    "forwarder_headers": _PROXY,
    "worker_connections": "set connections in the configuration's [server]",
    "preload_app": "connections to the backend must not be shared by processes",
    "max_requests": _RESTARTS,
    "max_requests_jitter": _RESTARTS,
    "reuse_port": "a stopping worker would leave clients waiting, and systemd's socket would not be listened to",
    "sendfile": "files are always sent by sendfile where that is possible",
    "user": _USER,
    "group": _USER,
    "initgroups": _USER,
    "tmp_upload_dir": "uploads are written into the cache's directory",
    "accesslog": _ACCESS_LOG,
    "access_log_format": _ACCESS_LOG,
    "disable_redirect_access_to_syslog": _SYSLOG,
    "syslog": _SYSLOG,
    "syslog_addr": _SYSLOG,
    "syslog_prefix": _SYSLOG,
    "syslog_facility": _SYSLOG,
    "statsd_host": _STATSD,
    "statsd_prefix": _STATSD,
    "dogstatsd_tags": _STATSD,
    "enable_backlog_metric": _STATSD,
    "paste": _PASTE,
    "raw_paste_global_conf": _PASTE,
    "pre_request": "it is not called: the application sees every request",
    "post_request": "it is not called: each request is logged and counted at its end",
    "proxy_protocol": "it is not spoken; let the proxy set X-Forwarded-For",
    "proxy_allow_ips": "the PROXY protocol is not spoken; let the proxy set X-Forwarded-For",
    "protocol": "the server speaks HTTP",
    "uwsgi_allow_ips": "the server speaks HTTP",
    "keyfile": _TLS,
    "certfile": _TLS,
    "ssl_context": _TLS,
    "ssl_version": _TLS,
    "cert_reqs": _TLS,
    "ca_certs": _TLS,
    "suppress_ragged_eofs": _TLS,
    "do_handshake_on_connect": _TLS,
    "ciphers": _TLS,
    "http_protocols": _HTTP1,
    "http2_cleartext": _HTTP1,
    "http2_max_concurrent_streams": _HTTP1,
    "http2_initial_window_size": _HTTP1,
    "http2_max_frame_size": _HTTP1,
    "http2_max_header_list_size": _HTTP1,
    "asgi_loop": _WSGI,
    "asgi_lifespan": _WSGI,
    "asgi_disconnect_grace_period": _WSGI,
    "websocket_max_message_size": _WSGI,
    "root_path": _WSGI,
    "dirty_apps": _DIRTY,
    "dirty_workers": _DIRTY,
    "dirty_timeout": _DIRTY,
    "dirty_threads": _DIRTY,
    "dirty_graceful_timeout": _DIRTY,
    "on_dirty_starting": _DIRTY,
    "dirty_post_fork": _DIRTY,
    "dirty_worker_init": _DIRTY,
    "dirty_worker_exit": _DIRTY,
}


def refusal(values: Mapping[str, Any], defaults: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """Why the server does not start with these settings, as a line about the first refused one; None: it starts.

    :param values: all settings in use.
    :param defaults: gunicorn's defaults.
    :param own: the settings that this server sets itself.

    >>> refusal({"timeout": 30, "threads": 8}, {"timeout": 60, "threads": 1}, {"threads": 8}) is None
    True
    >>> refusal({"threads": 1}, {"threads": 1}, {"threads": 8})
    "gunicorn's setting threads is not for this server: set it in the configuration's [server]"
    """
    for name, value in values.items():
        if name not in WORKING and value != own.get(name, defaults.get(name)):
            instead = KEPT.get(name) or REFUSED.get(name, "it is not known here")
            return f"gunicorn's setting {name} is not for this server: {instead}"
    return None
