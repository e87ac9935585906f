"""The attack list of the safety facts: by name, a function from the algorithm in force to the bytes of a bad token."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.unit.access.keys import (
    ALGORITHMS,
    NOW,
    assemble,
    b64,
    claims,
    ec_jwk,
    ec_key,
    header_for,
    jwks_for,
    private,
    rsa_key,
    sign,
    token,
)

Attack = Callable[[str], bytes]
ATTACKS: dict[str, Attack] = {}


def put(name: str, attack: Attack) -> None:
    assert name not in ATTACKS, name
    ATTACKS[name] = attack


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def raw_claims(text: str) -> Attack:
    """A truly signed token whose claims are this JSON text."""
    return lambda alg: assemble(dump(header_for(alg)), text.encode(), alg)


def raw_header(build: Callable[[str], str | bytes]) -> Attack:
    """A truly signed token whose header is this JSON text."""

    def make(alg: str) -> bytes:
        text = build(alg)
        return assemble(text if isinstance(text, bytes) else text.encode(), dump(claims()), alg)

    return make


def with_alg(name: Any, signature: bytes | None = None) -> Attack:
    def make(alg: str) -> bytes:
        header, payload = b64(dump(header_for(alg, alg=name))), b64(dump(claims()))
        signed = sign(f"{header}.{payload}".encode(), alg) if signature is None else signature
        return f"{header}.{payload}.{b64(signed)}".encode()

    return make


def with_signature(change: Callable[[bytes], bytes]) -> Attack:
    def make(alg: str) -> bytes:
        signing_input = f"{b64(dump(header_for(alg)))}.{b64(dump(claims()))}".encode()
        return signing_input + b"." + b64(change(sign(signing_input, alg))).encode()

    return make


def changed(change: Callable[[bytes], bytes]) -> Attack:
    """A good token, changed as bytes."""
    return lambda alg: change(token(alg))


def parts_changed(change: Callable[[list[bytes]], list[bytes]]) -> Attack:
    return changed(lambda good: b".".join(change(good.split(b"."))))


def confused(form: Callable[[Any], bytes]) -> Attack:
    """HS256 with the public key, in one of its encodings, as the secret."""

    def make(alg: str) -> bytes:
        public = (rsa_key() if alg == "HS256" else private(alg)).public_key()
        signing_input = f"{b64(dump(header_for(alg, alg='HS256')))}.{b64(dump(claims()))}".encode()
        return signing_input + b"." + b64(hmac.digest(form(public), signing_input, "sha256")).encode()

    return make


def loose_last_character(good: bytes, index: int) -> bytes:
    """The token with another last character of one part, which decodes to the same bytes."""
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    parts = good.split(b".")
    part = parts[index]
    assert len(part) % 4 != 0, "this part has no unused bits"
    parts[index] = part[:-1] + bytes([alphabet[alphabet.index(part[-1]) + 1]])
    return b".".join(parts)


def loose_payload(alg: str) -> bytes:
    for padding in range(3):
        good = token(alg, jti="j" * (padding + 1))
        if len(good.split(b".")[1]) % 4:
            return loose_last_character(good, 1)
    raise AssertionError


# -- algorithm and signature
for spelling in ("none", "None", "NONE", "nOnE", ""):
    put(f"alg {spelling!r}, empty signature", with_alg(spelling, b""))
    put(f"alg {spelling!r}, true signature", with_alg(spelling))
for odd in (
    None,
    1,
    True,
    ["HS256"],
    {"a": 1},
    "hs256",
    "HS256 ",
    "HS384",
    "HS512",
    "RS384",
    "PS256",
    "ES384",
    "ES512",
    "EdDSA",
    "dir",
):
    put(f"alg {odd!r}", with_alg(odd))
for other in ALGORITHMS:
    put(
        f"alg {other}, signed with a key of that kind",
        lambda alg, other=other: (
            token(other, key=b"attacker's secret, long enough for HS256")
            if other == "HS256"
            else token(other, key=rsa_key("attacker") if other == "RS256" else ec_key("attacker"))
        ),
    )
put("no alg", raw_header(lambda alg: '{"typ":"JWT","kid":"k1"}'))
put("empty signature", with_signature(lambda signature: b""))
put("no signature part", changed(lambda good: good.rpartition(b".")[0]))
put("signature with one bit changed", with_signature(lambda signature: bytes([signature[0] ^ 1]) + signature[1:]))
put("signature cut by one byte", with_signature(lambda signature: signature[:-1]))
put("signature and one more byte", with_signature(lambda signature: signature + b"\0"))
put("signature of zeros", with_signature(lambda signature: bytes(len(signature))))
put("signature of ones", with_signature(lambda signature: b"\xff" * len(signature)))
put("r = s = 0", with_signature(lambda signature: bytes(64)))
put("r = 0", with_signature(lambda signature: bytes(len(signature) // 2) + signature[len(signature) // 2 :]))
put("s = 0", with_signature(lambda signature: signature[: len(signature) // 2] + bytes(len(signature) // 2)))
put(
    "claims of another token",
    lambda alg: b".".join([token(alg).split(b".")[0], token(alg, sub="1").split(b".")[1], token(alg).split(b".")[2]]),
)
put(
    "wrong curve", lambda alg: assemble(dump(header_for(alg, alg="ES256")), dump(claims()), "ES256", ec_key("attacker"))
)
put(
    "wrong curve, ES384 on P-384",
    lambda alg: assemble(dump(header_for(alg, alg="ES384")), dump(claims()), "ES384", ec_key("x", "P-384")),
)
put("empty key", lambda alg: assemble(dump(header_for(alg, alg="HS256")), dump(claims()), "HS256", b""))
put(
    "key of another secret",
    lambda alg: assemble(dump(header_for(alg, alg="HS256")), dump(claims()), "HS256", b"x" * 32),
)
FORMS = {
    "PEM": lambda public: public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    "PEM without its last line end": lambda public: public.public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    ).rstrip(),
    "DER": lambda public: public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
    "PKCS1 or X9.62": lambda public: public.public_bytes(
        *(
            (Encoding.PEM, PublicFormat.PKCS1)
            if hasattr(public.public_numbers(), "n")
            else (Encoding.X962, PublicFormat.UncompressedPoint)
        )
    ),
    "OpenSSH": lambda public: public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH),
}
for form_name, form in FORMS.items():
    put(f"HS256 with the public key as {form_name}", confused(form))
put("HS256 with the public key as JWK", confused(lambda public: dump(ec_jwk(ec_key()))))
put("HS256 with the JWKS", confused(lambda public: dump(jwks_for("RS256"))))

# -- header
for kid in (None, 0, 1.5, True, [], ["k1"], {}, "", "/dev/null", "../../etc/passwd", "k1/../k1", "..\\k1", "k1\0",
            "k1\n", " k1", "ключ",
            "' OR 1=1 --", "k1'; DROP TABLE keys", "$(id)", "k" * 257, "\ud800", "file:///dev/null/.."):  # fmt: skip
    put(f"kid {kid!r:.40}", raw_header(lambda alg, kid=kid: dump(header_for(alg, kid=kid))))
put(
    "kid /dev/null, empty key",
    lambda alg: assemble(dump(header_for(alg, alg="HS256", kid="/dev/null")), dump(claims()), "HS256", b""),
)
for member, value in {
    "crit": ["exp"], "b64": False, "jku": "https://attacker.example/jwks.json",
    "x5u": "https://attacker.example/cert.pem",
    "jwk": ec_jwk(ec_key("attacker")), "x5c": ["MIIB"], "zip": "DEF", "enc": "A256GCM", "cty": "JWT",
}.items():  # fmt: skip
    put(
        f"header member {member}={value!r:.30}",
        raw_header(lambda alg, m=member, v=value: dump(header_for(alg, **{m: v}))),
    )
put("unknown crit", raw_header(lambda alg: dump(header_for(alg, crit=["x"], x=1))))
put("crit null", raw_header(lambda alg: dump(header_for(alg, crit=None))))
put(
    "jwk of the attacker, signed with it",
    lambda alg: assemble(
        dump(header_for(alg, alg="ES256", jwk=ec_jwk(ec_key("attacker")))), dump(claims()), "ES256", ec_key("attacker")
    ),
)
for typ in (None, 1, "JWE", "logout+jwt", "dpop+jwt", ["JWT"]):
    put(f"typ {typ!r}", raw_header(lambda alg, typ=typ: dump(header_for(alg, typ=typ))))
put("duplicate alg, the good one last", raw_header(lambda alg: f'{{"alg":"none","alg":"{alg}","kid":"k1"}}'))
put("duplicate alg, the good one first", raw_header(lambda alg: f'{{"alg":"{alg}","alg":"none","kid":"k1"}}'))
put("duplicate alg by escape", raw_header(lambda alg: f'{{"alg":"{alg}","\\u0061lg":"none","kid":"k1"}}'))
for text in ("", "null", "1", '"x"', "[]", '["alg","HS256"]', "{", "{}", '{"alg":', "\0"):
    put(f"header {text!r}", raw_header(lambda alg, text=text: text))
put("header with trailing bytes", raw_header(lambda alg: dump(header_for(alg)) + b"x"))
put("header twice", raw_header(lambda alg: dump(header_for(alg)) * 2))
put("header with a NUL behind", raw_header(lambda alg: dump(header_for(alg)) + b"\0"))
put("header in UTF-16", raw_header(lambda alg: json.dumps(header_for(alg)).encode("utf-16")))
put("header in UTF-16LE", raw_header(lambda alg: json.dumps(header_for(alg)).encode("utf-16-le")))
put("header in UTF-32", raw_header(lambda alg: json.dumps(header_for(alg)).encode("utf-32")))
put("header with a BOM", raw_header(lambda alg: b"\xef\xbb\xbf" + dump(header_for(alg))))
put("header not UTF-8", raw_header(lambda alg: dump(header_for(alg))[:-1] + b',"x":"\xff"}'))
put("header with overlong UTF-8", raw_header(lambda alg: dump(header_for(alg))[:-1] + b',"x":"\xc0\xaf"}'))
put("header of 1 MB", raw_header(lambda alg: dump(header_for(alg, x="x" * 1_000_000))))
put(
    "header of 10,000 nested arrays",
    raw_header(lambda alg: dump(header_for(alg))[:-1] + b',"x":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
)
put(
    "header of 2,500 nested arrays",
    raw_header(lambda alg: dump(header_for(alg))[:-1] + b',"x":' + b"[" * 2_500 + b"]" * 2_500 + b"}"),
)
put("header of 2,000 open objects", raw_header(lambda alg: b'{"x":' * 900))
put("header with NaN", raw_header(lambda alg: dump(header_for(alg))[:-1] + b',"x":NaN}'))

# -- form
put("empty", lambda alg: b".")
put("only dots", lambda alg: b"..")
put("one part", lambda alg: token(alg).split(b".")[0])
put("5 parts", parts_changed(lambda parts: [*parts, b"QQ", b"QQ"]))
put("4 parts", parts_changed(lambda parts: [*parts, b"QQ"]))
put("empty header part", parts_changed(lambda parts: [b"", *parts[1:]]))
put("empty claims part", parts_changed(lambda parts: [parts[0], b"", parts[2]]))
for index, part_name in enumerate(("header", "claims", "signature")):
    for pad in (b"=", b"=="):
        put(
            f"padding {pad!r} after the {part_name}",
            parts_changed(lambda p, i=index, pad=pad: [*p[:i], p[i] + pad, *p[i + 1 :]]),
        )
    for space in (b" ", b"\t", b"\n", b"\r\n", b"\0", b"\x0b", b"\xa0"):
        put(
            f"{space!r} inside the {part_name}",
            parts_changed(lambda p, i=index, s=space: [*p[:i], p[i][:4] + s + p[i][4:], *p[i + 1 :]]),
        )
    put(
        f"standard alphabet in the {part_name}",
        parts_changed(lambda p, i=index: [*p[:i], b"+/" + p[i][2:], *p[i + 1 :]]),
    )
    put(
        f"one character more in the {part_name}",
        parts_changed(lambda p, i=index: [*p[:i], p[i] + b"A" * (1 + -len(p[i]) % 4), *p[i + 1 :]]),
    )
put("line end behind", changed(lambda good: good + b"\n"))
put("NUL behind", changed(lambda good: good + b"\0"))
put("quoted", changed(lambda good: b'"' + good + b'"'))
put("trailing bytes", changed(lambda good: good + b"AAAA"))
put("percent-encoded dot", changed(lambda good: good.replace(b".", b"%2E", 1)))
put("two tokens", changed(lambda good: good + b", " + good))
put("UTF-16 token", changed(lambda good: good.decode().encode("utf-16")))
put("non-canonical last bits of the claims", loose_payload)
put("8 KiB and one byte", lambda alg: token(alg, x="x" * 8192))
put("1 MB of base64url", lambda alg: b"A" * 1_000_000)
put("1 MB of dots", lambda alg: b"." * 1_000_000)
put("binary", lambda alg: bytes(range(256)))

# -- claims
put("exp missing", lambda alg: token(alg, exp=...))
put("sub missing", lambda alg: token(alg, sub=...))
for name, text in {
    "string": f'"{NOW + 60}"', "float": f"{NOW + 60}.0", "half": f"{NOW + 60}.5", "exponent": "2e9",
    "Infinity": "Infinity", "-Infinity": "-Infinity",
    "NaN": "NaN", "1e400": "1e400", "-1e400": "-1e400", "negative": "-1", "zero": "0", "minus zero": "-0",
    "true": "true", "false": "false", "null": "null",
    "list": f"[{NOW + 60}]", "object": "{}", "2**53+1": str(2**53 + 1), "2**64": str(2**64), "400 digits": "9" * 400,
    "5,000 digits": "9" * 5000,
    "skewed by an hour": str(NOW - 3600), "past the leeway": str(NOW - 5), "hexadecimal": "0x7fffffff",
    "leading zero": f"0{NOW + 60}", "plus": f"+{NOW + 60}",
}.items():  # fmt: skip
    put(f"exp {name}", raw_claims(f'{{"sub":"42","exp":{text}}}'))
put("exp twice, the good one last", raw_claims(f'{{"sub":"42","exp":1,"exp":{NOW + 60}}}'))
put("exp twice, the good one first", raw_claims(f'{{"sub":"42","exp":{NOW + 60},"exp":1}}'))
put("sub twice", raw_claims(f'{{"sub":"42","sub":"1","exp":{NOW + 60}}}'))
put("duplicate inside", raw_claims(f'{{"sub":"42","exp":{NOW + 60},"x":{{"a":1,"a":2}}}}'))
for name, sub in {
    "empty": "", "word": "admin", "negative": "-1", "plus": "+1", "space": " 1", "line end": "1\n",
    "leading zero": "01", "underscore": "1_0", "2**64": str(2**64),
    "Arabic digits": "٤٢", "superscript": "²", "float text": "1.0", "exponent": "1e3", "500 digits": "1" * 500,
    "null": None, "true": True, "float": 42.0,
    "negative int": -1, "2**64 int": 2**64, "list": [42], "object": {"id": 42}, "SQL": "42 OR 1=1",
}.items():  # fmt: skip
    put(f"sub {name}", lambda alg, sub=sub: token(alg, sub=sub))
for claim in ("nbf", "iat"):
    put(f"{claim} ahead", lambda alg, claim=claim: token(alg, **{claim: NOW + 60}))
    for odd in (str(NOW), True, None, [NOW], -1, 2**60, {}):
        put(f"{claim} {odd!r}", lambda alg, claim=claim, odd=odd: token(alg, **{claim: odd}))
    for text in ("NaN", "Infinity", "-Infinity", "1e400", "9" * 400):
        put(f"{claim} {text:.10}", raw_claims(f'{{"sub":"42","exp":{NOW + 60},"{claim}":{text}}}'))
for tenant in (
    "",
    "a" * 65,
    "a b",
    "a/b",
    "../x",
    ".",
    "..",
    "-x",
    "a\n",
    "ä",
    "a{b}",
    1,
    None,
    True,
    [],
    ["default"],
    {},
):
    put(f"tenant {tenant!r:.30}", lambda alg, tenant=tenant: token(alg, tenant=tenant))
for quota in (True, False, None, "100", 100.0, 1.5, [], {}, 2**70):
    put(f"quota_remaining {quota!r}", lambda alg, quota=quota: token(alg, quota_remaining=quota))
put("quota_remaining 1e400", raw_claims(f'{{"sub":"42","exp":{NOW + 60},"quota_remaining":1e400}}'))
for models in (None, "gpt", [1], ["a", None], [""], {"a": 1}, [["a"]], True):
    put(f"models {models!r}", lambda alg, models=models: token(alg, models=models))
for jti in (None, 1, "", True, [], "j" * 257, "a\nb", "a\0", "\ud800"):
    put(f"jti {jti!r:.20}", lambda alg, jti=jti: token(alg, jti=jti))
for aud in (1, None, True, {}, [1], ["a", None]):
    put(f"aud {aud!r}, none configured", lambda alg, aud=aud: token(alg, aud=aud))
for iss in (1, None, True, {}, ["a"]):
    put(f"iss {iss!r}, none configured", lambda alg, iss=iss: token(alg, iss=iss))
for text in ("", "null", "1", '"x"', "[]", "{}", "{", '[{"sub":"42"}]', "\0"):
    put(f"claims {text!r}", raw_claims(text))
put("claims with trailing bytes", raw_claims(json.dumps(claims()) + "x"))
put("claims in UTF-16", lambda alg: assemble(dump(header_for(alg)), json.dumps(claims()).encode("utf-16"), alg))
put("claims with a BOM", lambda alg: assemble(dump(header_for(alg)), b"\xef\xbb\xbf" + dump(claims()), alg))
put("claims not UTF-8", lambda alg: assemble(dump(header_for(alg)), dump(claims())[:-1] + b',"x":"\xff"}', alg))
put(
    "claims of 10,000 nested arrays",
    raw_claims(json.dumps(claims())[:-1] + ',"x":' + "[" * 10_000 + "]" * 10_000 + "}"),
)
put("claims of 2,500 nested arrays", raw_claims(json.dumps(claims())[:-1] + ',"x":' + "[" * 2_500 + "]" * 2_500 + "}"))
put("claims with a raw control character", raw_claims(json.dumps(claims())[:-1] + ',"x":"\n"}'))
