"""What a lying server answers: honest answers of SGLang and vLLM with one thing changed, each by its name."""

from __future__ import annotations

from typing import Any

from lying_server import LENGTH, TOKEN, VERSION, VOCABULARY, Reply, at, bomb, endless

SGLANG, VLLM = "/generate", "/inference/v1/generate"
META, CHOICE = "meta_info", ("choices", 0)
SPANS, ROWS, REASON = (META, "weight_versions"), (META, "output_token_logprobs"), (META, "finish_reason")
NESTED = b"[" * 100_000 + b"]" * 100_000


def tokens(*ids: Any) -> Any:
    """Other token ids of an SGLang sample, in both places."""

    def changed(answer: Any) -> Any:
        answer[0]["output_ids"] = list(ids)
        answer[0][META]["output_token_logprobs"] = [[-0.5, each, None] for each in ids]
        answer[0][META]["weight_versions"] = [{"version": str(VERSION), "start": 0, "end": len(ids)}]
        return answer

    return changed


def logprob(value: Any) -> Any:
    return at(*ROWS, 0, 0, becomes=value)


def version(value: Any) -> Any:
    return at(*SPANS, 0, "version", becomes=value)


def spans(*found: Any) -> Any:
    return at(*SPANS, becomes=[dict(zip(("start", "end", "version"), each, strict=True)) for each in found])


V = str(VERSION)
LIES: dict[str, Any] = {
    "an id beyond the vocabulary": tokens(TOKEN, TOKEN, TOKEN, VOCABULARY),
    "a far id": tokens(TOKEN, TOKEN, TOKEN, 2**31 - 2),
    "an id of 64 bits": tokens(TOKEN, TOKEN, TOKEN, 2**63),
    "an id of 70 bits": tokens(TOKEN, TOKEN, TOKEN, 2**70),
    "a negative id": tokens(TOKEN, TOKEN, TOKEN, -1),
    "an id that is true": tokens(TOKEN, TOKEN, TOKEN, True),
    "an id with a fraction": tokens(TOKEN, TOKEN, TOKEN, 7.5),
    "an id that is a whole float": tokens(TOKEN, TOKEN, TOKEN, 7.0),
    "an id that is text": tokens(TOKEN, TOKEN, TOKEN, "7"),
    "an id that is null": tokens(TOKEN, TOKEN, TOKEN, None),
    "an id that is a list": tokens(TOKEN, TOKEN, TOKEN, [7]),
    "too many tokens": tokens(*[TOKEN] * (LENGTH + 1)),
    "too few tokens": tokens(TOKEN),
    "no tokens": tokens(),
    "tokens after a stop": tokens(TOKEN, 2, TOKEN, TOKEN),
    "ids of other log-probs": at("output_ids", 0, becomes=8),
    "ids that are an object": at("output_ids", becomes={"0": 7}),
    "ids that are a number": at("output_ids", becomes=7),
    "a log-prob of -1e30": logprob(-1e30),
    "a log-prob of -105": logprob(-105.0),
    "a log-prob that is whole and far": logprob(-(10**15)),
    "a log-prob of 1": logprob(1.0),
    "a log-prob that is infinite": logprob(-1e400),
    "a log-prob beyond float32": logprob(-1e300),
    "a log-prob that is true": logprob(True),
    "a log-prob that is null": logprob(None),
    "a log-prob that is text": logprob("-0.5"),
    "a log-prob that is a list": logprob([-0.5]),
    "a log-prob that is an integer of 70 bits": logprob(-(2**70)),
    "one log-prob more": at(*ROWS, by=lambda rows: [*rows, rows[0]]),
    "one log-prob less": at(*ROWS, by=lambda rows: rows[1:]),
    "rows of one number": at(*ROWS, becomes=[[-0.5]] * LENGTH),
    "rows that are text": at(*ROWS, becomes=["ab"] * LENGTH),
    "rows that are null": at(*ROWS, becomes=None),
    "no rows": at(META, becomes={}),
    "meta that is a list": at(META, becomes=[]),
    "meta that is null": at(META, becomes=None),
    "no finish": at(*REASON, becomes=None),
    "a finish that is text": at(*REASON, becomes="length"),
    "an odd finish": at(*REASON, "type", becomes="tired"),
    "a finish that is a list": at(*REASON, "type", becomes=["length"]),
    "a finish that is an object": at(*REASON, "type", becomes={}),
    "a stop without one": at(*REASON, "type", becomes="stop"),
    "a stop at a huge token": at(*REASON, becomes={"type": "stop", "matched": 2**63}),
    "an old version": version("2"),
    "a newer version": version("4"),
    "a version of 10^21": version(str(10**21)),
    "a version of 5,000 digits": version("9" * 5000),
    "a version in other digits": version("\u0663"),
    "a negative version": version("-3"),
    "a version that is a number": version(3),
    "a version that is null": version(None),
    "a version that falls": spans((0, 2, "4"), (2, LENGTH, "3")),
    "versions of fewer tokens": spans((0, 2, V)),
    "versions of more tokens": spans((0, LENGTH + 1, V)),
    "versions with a gap": spans((0, 1, V), (2, LENGTH, V)),
    "versions that go back": spans((0, LENGTH, V), (2, 1, V)),
    "spans of floats": spans((0.0, 4.0, V)),
    "spans of booleans": spans((False, True, V), (1, LENGTH, V)),
    "spans of text": spans(("0", "4", V)),
    "spans of 10^30 tokens": spans((0, 10**30, V)),
    "spans that are text": at(*SPANS, becomes="3"),
    "spans that are numbers": at(*SPANS, becomes=[3]),
    "one sample less": lambda answer: answer[:1],
    "one sample more": lambda answer: [*answer, answer[0]],
    "samples that are null": lambda answer: [None, None],
    "an object": lambda answer: {"hello": 1},
    "a number": lambda answer: 7,
    "a text": lambda answer: "[]",
    "nothing": lambda answer: b"",
    "no JSON": lambda answer: b'[{"text": "and then it brea',
    "NaN": lambda answer: b'[{"output_ids": [NaN]}, {}]',
    "a page of HTML": lambda answer: Reply([b"<html>hello</html>"], Content_Type="text/html"),
    "no UTF-8": lambda answer: b'["\xff\xfe"]',
    "a deep list": lambda answer: NESTED,
    "a deep object": lambda answer: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a million lists": lambda answer: b"[" + b"[]," * 10_000 + b"[]]",
    "a compressed body": bomb,
    "an unknown encoding": lambda answer: Reply([b"[]"], Content_Encoding="zstd"),
    "a redirect": lambda answer: Reply([b""], 302, Location="http://127.0.0.1:1/"),
    "an error": lambda answer: Reply([b'{"error": {"message": ' * 400 + b"1" + b"}}" * 400], 500),
    "an endless error": lambda answer: Reply(endless(b"x" * 65_536)(answer).parts, 500),
    "an odd status": lambda answer: Reply([b"[]"], 299),
    "a wrong length": lambda answer: Reply(iter([b"[]"]), Content_Length="1000000"),
    "a length that is text": lambda answer: Reply(iter([b"[]"]), Content_Length="many"),
    "an endless body": endless(b" " * 65_536),
    "a slow drip": endless(b" ", 0.02),
}
VLLM_LIES: dict[str, Any] = {
    "an id beyond the vocabulary": lambda answer: at("logprobs", "content", 0, "token_id", becomes=VOCABULARY)(
        at("token_ids", 0, becomes=VOCABULARY)(answer["choices"][0])
    ) and answer,
    "a log-prob of -1e30": at(*CHOICE, "logprobs", "content", 0, "logprob", becomes=-1e30),
    "log-probs of other tokens": at(*CHOICE, "logprobs", "content", 0, "token_id", becomes=TOKEN + 1),
    "an old version": at(*CHOICE, "weight_versions", 0, "version", becomes="2"),
    "no versions": at(*CHOICE, "weight_versions", becomes=None),
    "an id that is true": at(*CHOICE, "token_ids", 0, becomes=True),
    "no log-probs": at(*CHOICE, "logprobs", becomes=None),
    "log-probs that are a list": at(*CHOICE, "logprobs", becomes=[]),
    "no ids": at(*CHOICE, "token_ids", becomes=None),
    "one choice twice": at("choices", 1, "index", becomes=0),
    "choices of text": at("choices", becomes=["a", "b"]),
    "choices that are null": at("choices", becomes=None),
    "an index that is text": at(*CHOICE, "index", becomes="0"),
    "an odd finish": at(*CHOICE, "finish_reason", becomes=[]),
    "a bomb": bomb,
    "an endless body": endless(b" " * 65_536),
}  # fmt: skip
