"""The bytes of every message, written down: a change of format must be seen here first."""

from __future__ import annotations

import typing

import pytest

from penstock.shapes import (
    Attempt,
    FinishReason,
    Handoff,
    Incarnation,
    Load,
    Output,
    Sampling,
    TokenLogprob,
    TraceContext,
)
from penstock.wire.frames import decode_to_frontend, decode_to_worker, encode
from penstock.wire.messages import (
    Asset,
    AssetRequest,
    Bounce,
    Cancel,
    Challenge,
    Draining,
    Generate,
    Goodbye,
    Heartbeat,
    Hello,
    Ping,
    Refused,
    Release,
    Snapshot,
    Step,
    ToFrontend,
    ToWorker,
    Welcome,
    halves,
)
from tests.cards import card

LOAD = Load(1, 2, 3, 4, 5, 6, 7, 8)
CARD = card(epoch=1_700_000_000_000, eos_token_ids=[2], assets={"tokenizer.json": "ab" * 32})
HANDOFF = Handoff("a1", Incarnation("w0", 1), 1, 16, 2**63, "l", 9.5, "tcp", "h:1", b"p")
TRACE = TraceContext("00-01", "a=1")
TOOK = (1.5, 0.0, 20.0, 0.0)
SAMPLING = Sampling(5, 1, 0.5, 0.9, 40, 0.1, 7, 0.2, 0.3, 1.1, {5: -1.0}, (2, 3), True, 4)
GOLDEN: list[tuple[ToFrontend | ToWorker, str]] = [
    (
        Challenge(protocol=1, nonce=b"nonce"),
        "83a174a96368616c6c656e6765a870726f746f636f6c01a56e6f6e6365c4056e6f6e6365",
    ),
    (
        Hello(protocol=1, frontend_id="f1", nonce=b"nonce", proof=b"proof"),
        "85a174a568656c6c6fa870726f746f636f6c01ab66726f6e74656e645f6964a26631a56e6f6e6365c4056e6f"
        "6e6365a570726f6f66c40570726f6f66",
    ),
    (
        Welcome(card=CARD, proof=b"proof"),
        "83a174a777656c636f6d65a46361726484ab696e6361726e6174696f6e82ab696e7374616e63655f6964a27731a5"
        "65706f6368cf0000018bcfe56800a4726f6c65a66465636f6465a6656e67696e6589a46e616d65a165a56d6f6465"
        "6c87a46e616d65a16dad6d61785f6d6f64656c5f6c656ecd1000aa766f6361625f73697a65cd03e8ad656f735f74"
        "6f6b656e5f6964739102a777656967687473a0a661737365747381ae746f6b656e697a65722e6a736f6ed9406162"
        "61626162616261626162616261626162616261626162616261626162616261626162616261626162616261626162"
        "61626162616261626162616261626162a9616e73776572696e6785b173616d706c696e675f64656661756c747380"
        "b1737472756374757265645f6f7574707574c2ab746f6f6c5f706172736572a0b0726561736f6e696e675f706172"
        "736572a0af7468696e6b696e675f627564676574c2aa626c6f636b5f73697a6510ac746f74616c5f626c6f636b73"
        "64a66c61796f7574a0a97472616e73706f7274a0b06d61785f62617463685f746f6b656e7300ab6d61785f72756e"
        "6e696e6700a96b765f6576656e7473c3a7616c696173657390a570726f6f66c40570726f6f66",
    ),
    (
        Refused(reason="no"),
        "82a174a772656675736564a6726561736f6ea26e6f",
    ),
    (
        Snapshot(hashes=[1, 2**64 - 1]),
        "82a174a8736e617073686f74a66861736865739201cfffffffffffffffff",
    ),
    (
        Snapshot(hashes=[], last=True, load=LOAD),
        "84a174a8736e617073686f74a668617368657390a46c617374c3a46c6f61649c010203040506070897cb3ff00000"
        "00000000cb3f947ae147ae147bcb3f947ae147ae147bcb3fe0000000000000cb3f847ae147ae147bcb3eb0c6f7a0"
        "b5ed8dcb3ef4f8b588e368f100cb000000000000000000",
    ),
    (
        Step(seen=7, load=LOAD),
        "83a174a473746570a47365656e07a46c6f61649c010203040506070897cb3ff0000000000000cb3f947ae147ae14"
        "7bcb3f947ae147ae147bcb3fe0000000000000cb3f847ae147ae147bcb3eb0c6f7a0b5ed8dcb3ef4f8b588e368f1"
        "00cb000000000000000000",
    ),
    (
        Step(seen=7, load=LOAD, outputs=[Output("a1", [5, 6])], stored=[1, 2], removed=[3], cleared=True),
        "87a174a473746570a47365656e07a46c6f61649c010203040506070897cb3ff0000000000000cb3f947ae147ae14"
        "7bcb3f947ae147ae147bcb3fe0000000000000cb3f847ae147ae147bcb3eb0c6f7a0b5ed8dcb3ef4f8b588e368f1"
        "00cb000000000000000000a76f757470757473919aa26131920506c0c0c0c0c0c0c0c0a673746f726564920102a7"
        "72656d6f7665649103a7636c6561726564c3",
    ),
    (
        Step(
            seen=7,
            load=LOAD,
            outputs=[Output("a1", [5], FinishReason.PREFILLED, 16, None, HANDOFF, None, 2, None, TOOK)],
        ),
        "84a174a473746570a47365656e07a46c6f61649c010203040506070897cb3ff0000000000000cb3f947ae147ae14"
        "7bcb3f947ae147ae147bcb3fe0000000000000cb3f847ae147ae147bcb3eb0c6f7a0b5ed8dcb3ef4f8b588e368f1"
        "00cb000000000000000000a76f757470757473919aa261319105a970726566696c6c656410c08aaa68616e646f66"
        "665f6964a26131a6686f6c64657282ab696e7374616e63655f6964a27730a565706f636801aa6e756d5f746f6b65"
        "6e7301aa626c6f636b5f73697a6510a96c6173745f68617368cf8000000000000000a66c61796f7574a16ca57474"
        "6c5f73cb4023000000000000a97472616e73706f7274a3746370a761646472657373a3683a31a6706172616d73c4"
        "0170c002c094cb3ff8000000000000cb0000000000000000cb4034000000000000cb0000000000000000",
    ),
    (
        Step(seen=7, load=LOAD, outputs=[Output("a1", [5], logprobs=[TokenLogprob(5, -0.5, [(5, -0.5)])])]),
        "84a174a473746570a47365656e07a46c6f61649c010203040506070897cb3ff0000000000000cb3f947ae147ae14"
        "7bcb3f947ae147ae147bcb3fe0000000000000cb3f847ae147ae147bcb3eb0c6f7a0b5ed8dcb3ef4f8b588e368f1"
        "00cb000000000000000000a76f757470757473919aa261319105c0c0919305cbbfe0000000000000919205cbbfe0"
        "000000000000c0c0c0c0c0",
    ),
    (
        Step(seen=7, load=LOAD, outputs=[Output("a1", [], FinishReason.ERROR, error="bad")]),
        "84a174a473746570a47365656e07a46c6f61649c010203040506070897cb3ff0000000000000cb3f947ae147ae14"
        "7bcb3f947ae147ae147bcb3fe0000000000000cb3f847ae147ae147bcb3eb0c6f7a0b5ed8dcb3ef4f8b588e368f1"
        "00cb000000000000000000a76f757470757473919aa2613190a56572726f72c0c0c0a3626164c0c0c0",
    ),
    (
        Heartbeat(seen=7, load=LOAD),
        "83a174a9686561727462656174a47365656e07a46c6f61649c010203040506070897cb3ff0000000000000cb3f94"
        "7ae147ae147bcb3f947ae147ae147bcb3fe0000000000000cb3f847ae147ae147bcb3eb0c6f7a0b5ed8dcb3ef4f8"
        "b588e368f100cb000000000000000000",
    ),
    (
        Bounce(attempt_id="a1", reason="full", retry_after_s=0.5),
        "84a174a6626f756e6365aa617474656d70745f6964a26131a6726561736f6ea466756c6cad72657472795f61"
        "667465725f73cb3fe0000000000000",
    ),
    (
        Asset(sha256="ab", data=b"content", last=True),
        "84a174a56173736574a6736861323536a26162a464617461c407636f6e74656e74a46c617374c3",
    ),
    (
        Asset(sha256="ab", last=True, missing=True),
        "84a174a56173736574a6736861323536a26162a46c617374c3a76d697373696e67c3",
    ),
    (
        Draining(reason="upgrade"),
        "82a174a8647261696e696e67a6726561736f6ea775706772616465",
    ),
    (
        Goodbye(reason="bye"),
        "82a174a7676f6f64627965a6726561736f6ea3627965",
    ),
    (
        Generate(seq=1, attempt=Attempt("a1", "r1", [1, 300, 70000], 2, Sampling(max_tokens=5))),
        "83a174a867656e6572617465a373657101a7617474656d70748aaa617474656d70745f6964a26131aa726571"
        "756573745f6964a27231a9746f6b656e5f6964739301cd012cce00011170aa70726f6d70745f6c656e02a873"
        "616d706c696e67de0001aa6d61785f746f6b656e7305ac70726566696c6c5f6f6e6c79c2a768616e646f6666"
        "c0aa63616368655f73616c74a0a87072696f7269747900a57472616365c0",
    ),
    (
        Generate(seq=2, attempt=Attempt("a2", "r1", [1], 1, SAMPLING, True, HANDOFF, "salt", 1, TRACE)),
        "83a174a867656e6572617465a373657102a7617474656d70748aaa617474656d70745f6964a26132aa72657175"
        "6573745f6964a27231a9746f6b656e5f6964739101aa70726f6d70745f6c656e01a873616d706c696e67de000e"
        "aa6d61785f746f6b656e7305aa6d696e5f746f6b656e7301ab74656d7065726174757265cb3fe0000000000000"
        "a5746f705f70cb3feccccccccccccda5746f705f6b28a56d696e5f70cb3fb999999999999aa47365656407b070"
        "726573656e63655f70656e616c7479cb3fc999999999999ab16672657175656e63795f70656e616c7479cb3fd3"
        "333333333333b272657065746974696f6e5f70656e616c7479cb3ff199999999999aaa6c6f6769745f62696173"
        "8105cbbff0000000000000ae73746f705f746f6b656e5f696473920203aa69676e6f72655f656f73c3a86c6f67"
        "70726f627304ac70726566696c6c5f6f6e6c79c3a768616e646f66668aaa68616e646f66665f6964a26131a668"
        "6f6c64657282ab696e7374616e63655f6964a27730a565706f636801aa6e756d5f746f6b656e7301aa626c6f63"
        "6b5f73697a6510a96c6173745f68617368cf8000000000000000a66c61796f7574a16ca574746c5f73cb402300"
        "0000000000a97472616e73706f7274a3746370a761646472657373a3683a31a6706172616d73c40170aa636163"
        "68655f73616c74a473616c74a87072696f7269747901a5747261636582ab7472616365706172656e74a53030"
        "2d3031aa74726163657374617465a3613d31",
    ),
    (
        Cancel(attempt_id="a1"),
        "82a174a663616e63656caa617474656d70745f6964a26131",
    ),
    (
        Release(handoff_id="a1"),
        "82a174a772656c65617365aa68616e646f66665f6964a26131",
    ),
    (
        AssetRequest(sha256="ab"),
        "82a174ac617373657472657175657374a6736861323536a26162",
    ),
    (
        Ping(),
        "81a174a470696e67",
    ),
]


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=lambda value: type(value).__name__)
def test_bytes_of_each_message(message: ToFrontend | ToWorker, golden: str) -> None:
    frame = encode(message)
    assert frame[4:].hex() == golden
    decode = decode_to_worker if isinstance(message, ToWorker) else decode_to_frontend
    assert decode(frame[4:]) == message


def test_every_message_is_written_down() -> None:
    written = {type(message) for message, _ in GOLDEN}
    assert written == {*typing.get_args(ToFrontend), *typing.get_args(ToWorker)}


def test_a_step_that_says_one_thing_cannot_be_halved() -> None:
    assert halves(Step(seen=1, load=LOAD, stored=[1])) is None
    assert halves(Step(seen=1, load=LOAD)) is None


@pytest.mark.parametrize("counts", [(2, 0, 0), (1, 1, 0), (0, 1, 1), (1, 3, 0), (3, 1, 5), (1, 0, 6)])
def test_the_halves_of_a_step_say_the_same_in_its_order(counts: tuple[int, int, int]) -> None:
    removed, stored, outputs = counts
    step = Step(
        seen=1,
        load=LOAD,
        cleared=True,
        removed=list(range(removed)),
        stored=list(range(stored)),
        outputs=[Output(str(number)) for number in range(outputs)],
    )
    first, second = halves(step)
    assert (first.cleared, second.cleared) == (True, False)
    for name in ("removed", "stored", "outputs"):
        assert getattr(first, name) + getattr(second, name) == getattr(step, name)
    assert not (first.stored and second.removed)
    sizes = [len(part.removed) + len(part.stored) + len(part.outputs) for part in (first, second)]
    assert abs(sizes[0] - sizes[1]) <= 1
