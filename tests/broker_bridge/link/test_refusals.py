"""A broker that refuses a certificate and hangs up is quoted, however late we look.

In TLS 1.3 a client is done with the handshake before the broker has seen its certificate. A
machine that is busy finds the connection ended before it has sent CONNECT; the reason is there.
"""

import select
import socket
import ssl
import struct
import threading
from contextlib import closing, suppress

import pytest

from broker_bridge.errors import LinkError
from broker_bridge.link.failures import Failure
from broker_bridge.link.paho_link import PahoLink
from broker_bridge.link.poller import Poller
from broker_bridge.link.session_settings import SessionSettings
from broker_bridge.link.tls import client_context
from server.fleet.authority import Authority
from tests.broker_bridge.link.reading import GIVE_UP_S, reason_of


class Late(ssl.SSLSocket):
    """A client that after the handshake does nothing until the other side has hung up."""

    def do_handshake(self, block=False):
        super().do_handshake(block)
        ended = select.poll()
        ended.register(self, 0)  # POLLHUP and POLLERR are always told
        assert ended.poll(GIVE_UP_S * 1000)


def settings(port, files, *, version=ssl.TLSVersion.TLSv1_3):
    context = client_context(files)
    context.minimum_version = context.maximum_version = version
    context.sslsocket_class = Late
    return SessionSettings(
        host="localhost", port=port, client_id="ward-1", tls=context, backoff_first_s=0.05
    )


def opened(settings):
    """What `PahoLink.open` does with a context of its own."""
    link = PahoLink(settings)
    link._thread.start()
    try:
        link._wait_for_first_connection(GIVE_UP_S)
    finally:
        link.close()


def expired(pki):
    issued = pki.ca.issue_with_new_key("ward-1", now=pki.now, days=0)
    return pki.files("refused-expired", issued=issued)


def strange(pki):
    stranger = Authority.create("midge test", now=pki.now)
    issued = stranger.issue_with_new_key("ward-1", now=pki.now)
    return pki.files("refused-strange", issued=issued)


@pytest.mark.parametrize("made", [expired, strange])
def test_a_refusal_that_came_before_we_had_said_a_word_is_told(tls_broker, pki, made):
    with pytest.raises(LinkError, match="refused our client certificate"):
        opened(settings(tls_broker.port, made(pki)))


def test_a_refusal_that_came_before_we_had_said_a_word_is_told_to_polled_links_too(tls_broker, pki):
    with closing(Poller()) as poller:
        link = poller.open(settings(tls_broker.port, expired(pki)))
        while not link.has_news:
            poller.turn(GIVE_UP_S)
        assert "refused our client certificate" in link.receive(0).reason


class Rude(threading.Thread):
    """Shakes hands as the broker does, and then ends every connection without a word."""

    def __init__(self, pki):
        super().__init__(daemon=True)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(pki.folder / "broker.pem", pki.folder / "broker-key.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            with raw, suppress(OSError):
                # Not to linger is to reset.
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._context.wrap_socket(raw, server_side=True).close()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join()


def test_a_broker_that_resets_after_the_handshake_may_mean_our_certificate(pki):
    with closing(Rude(pki)) as rude:
        link = PahoLink(settings(rude.port, pki.files("ward-1")))
        link._thread.start()
        assert "without a word after the TLS handshake" in reason_of(link)


def test_what_no_retry_can_mend_is_not_replaced_by_what_says_less(pki):
    """A thread that was not woken at once hears of the first failure all the same."""
    link = PahoLink(settings(1, pki.files("ward-1")))
    with closing(link._wake_read), closing(link._wake_write):
        link._report(Failure("the certificate was refused", final=True))
        link._report(Failure("hung up"))
        with pytest.raises(LinkError, match="the certificate was refused"):
            link._wait_for_first_connection(0.0)
