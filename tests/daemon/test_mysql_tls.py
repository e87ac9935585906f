"""TLS to the database: asked for by `ssl_ca`, then never without it, and the certificate is checked."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from proxyd.store.mysql import MysqlReader, MysqlStore
from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.mysql_apply import apply
from proxyd.store.schema import StoreError
from tests.daemon.harness import wait_for
from tests.daemon.mariadb import USER, Database, MariaDb
from tests.daemon.store_house import HASTY, NODE


async def opened(address: MysqlAddress) -> None:
    store = MysqlStore(address, NODE, None, HASTY)
    try:
        await store.open()
    finally:
        await store.close()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "database")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    folder.mkdir()
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
    )
    return folder / "cert.pem", folder / "key.pem"


async def test_tls_is_used_and_the_certificate_checked_when_a_ca_is_named(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path / "right")
    other, _ = certificate(tmp_path / "other")
    with MariaDb(ssl_cert=cert, ssl_key=key) as server:
        database = server.create()
        url = database.url()
        trusted = MysqlAddress.parse(f"{url}?ssl_ca={cert}")
        apply(trusted)
        server.query(f"ALTER USER '{USER}'@'%' REQUIRE SSL")
        await opened(trusted)
        MysqlReader(trusted).close()
        for wrong in (f"{url}?ssl_ca={other}", url, f"{url}?ssl_ca={tmp_path}/none.pem", f"{url}?ssl_ca={key}"):
            address = MysqlAddress.parse(wrong)
            with pytest.raises(StoreError):
                await opened(address)
            if address.ssl_ca:  # without one PyMySQL uses TLS where it is offered, and checks nothing
                with pytest.raises(StoreError):
                    MysqlReader(address)


async def test_a_server_without_tls_is_refused_when_a_ca_is_named(tmp_path: Path, mariadb: Database) -> None:
    cert, _ = certificate(tmp_path / "some")
    address = MysqlAddress.parse(f"{mariadb.url()}?ssl_ca={cert}")
    with pytest.raises(StoreError, match="offers no TLS"):
        await opened(address)
    with pytest.raises(StoreError, match="SSL is required"):
        MysqlReader(address)
    wait_for(
        lambda: mariadb.query("SELECT COUNT(*) FROM information_schema.processlist WHERE user = 'proxyd'")[0][0] == 0
    )
