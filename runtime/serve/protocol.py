"""What the bodies of requests may say.

A parameter is honoured, or a label that asks for nothing, or has its neutral value; anything else is an error that
names it. null is the same as absent, as in OpenAI's API.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError, from_json

from ..sampling import BIAS_MAX, PENALTY_MAX
from ..strict_json import no_duplicates
from .faults import ApiError

B = TypeVar("B", bound="Body")

# Parameters of OpenAI's API that an endpoint does not honour, and the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "conversation": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "include": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "reasoning": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "text": ({}, {"format": {"type": "text"}}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "verbosity": (),
    "web_search_options": (),
}
STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
MOST_VALUES = 50_000  # in a body: for each that is wrong pydantic keeps an error of 1.5 KB, and reports the first
MOST_MESSAGES = 1024  # rendering a dialogue takes time that grows with their square
LARGEST_SEED = 2**63 - 1
TokenId = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,17})$")]


class Body(BaseModel):
    """A request's body."""

    model_config = STRICT


# --- dialogues -------------------------------------------------------------------------------------------------------


def _as_parts(kind: str) -> BeforeValidator:
    """A content that is a text is one part of type `kind`; null is none."""

    def parts(value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": kind, "text": value}]
        return [] if value is None else value

    return BeforeValidator(parts)


class OnePart(Body):
    """A part of a turn: `type` names the kind, and WITH the field that has its content."""

    WITH: ClassVar[Mapping[str, str]] = {}
    text: str | None = None
    refusal: str | None = None

    @property
    def picture(self) -> str | None:
        """The URL of the picture that this part is."""
        return None

    @property
    def frames(self) -> list[str] | None:
        """The URLs of the frames of the video that this part is."""
        return None

    @property
    def moments(self) -> list[float]:
        """When each of these frames is shown; empty: it does not say."""
        return []

    @model_validator(mode="after")
    def _has_its_content(self) -> OnePart:
        kind: str = self.type  # type: ignore[attr-defined]
        given = {field for field in self.WITH.values() if getattr(self, field) is not None}
        if given != {self.WITH[kind]}:
            raise PydanticCustomError("part", f"a part of type {kind!r} has {self.WITH[kind]!r}, and nothing else")
        return self


class ImageUrl(Body):
    """A picture in chat completions."""

    url: str
    detail: Literal["auto", "high"] | None = None


class ChatPart(OnePart):
    """A part of a chat message."""

    WITH = {"text": "text", "refusal": "refusal", "image_url": "image_url", "video": "video"}
    type: Literal["text", "refusal", "image_url", "video"]
    image_url: ImageUrl | None = None
    video: list[str] | None = None  # data URLs of its frames, in order
    seconds: list[float] | None = None  # when each frame of the video is shown

    @model_validator(mode="after")
    def _has_seconds_of_a_video(self) -> ChatPart:
        if self.seconds is not None and self.video is None:
            raise PydanticCustomError("part", f"a part of type {self.type!r} has no 'seconds'")
        return self

    @property
    def picture(self) -> str | None:
        """The data URL of the part's image; None if it has none."""
        return self.image_url.url if self.image_url else None

    @property
    def frames(self) -> list[str] | None:
        """The data URLs of the part's frames; None if it is no video."""
        return self.video

    @property
    def moments(self) -> list[float]:
        """When each frame is shown, in seconds; none if the part does not say."""
        return self.seconds or []


Role = Literal["system", "developer", "user", "assistant"]


class ChatMessage(Body):
    """A turn. What a client sends back of our own answers is accepted: nulls, and `refusal`."""

    role: Role
    content: Annotated[list[ChatPart], _as_parts("text"), WithJsonSchema({"type": ["string", "array", "null"]})] = []
    refusal: str | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[None, BeforeValidator(lambda value: value or None)] = None
    annotations: list[Any] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if not self.content and self.refusal is None:
            raise PydanticCustomError("message", "the message has no content")
        return self


class ItemPart(OnePart):
    """A part of a message of the Responses API."""

    WITH = {"input_text": "text", "output_text": "text", "refusal": "refusal", "input_image": "image_url"}
    type: Literal["input_text", "output_text", "refusal", "input_image"]
    image_url: str | None = None
    detail: Literal["auto", "high"] | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None

    @property
    def picture(self) -> str | None:
        """The data URL of the part's image; None if it has none."""
        return self.image_url


class Item(Body):
    """A message of the Responses API, as asked or as answered before."""

    type: Literal["message"] = "message"
    role: Role
    content: Annotated[list[ItemPart], _as_parts("input_text"), WithJsonSchema({"type": ["string", "array"]})]
    id: str | None = None
    status: str | None = None
    phase: None = None


# --- the three endpoints ---------------------------------------------------------------------------------------------


class GateOptions(Body):
    """What a request may say about the gate: a policy that is at least as strict as the server's weakest."""

    policy: Literal["stop", "steer", "report", "off"] | None = None


class Generation(Body):
    """What all requests for an answer share. The defaults are greedy; without a seed, sampling differs each time."""

    FORMAT: ClassVar[str]  # which parameter has the JSON schema

    model: str
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    # Labels: they change no answer; nothing is done with them, and nothing is kept.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Ours.
    autosteer: GateOptions | None = None


class Schema(Body):
    """A JSON schema by name, as chat completions nest it. Always strict, so `strict` asks for nothing."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`response_format` of chat completions."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("format", "type 'json_schema' has 'json_schema', and no other has")
        return self

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, if there is one."""
        return self.json_schema.schema_ if self.json_schema else ANY_OBJECT[self.type]


class TextFormat(Body):
    """`text.format` of the Responses API, which nests nothing."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise PydanticCustomError("format", "type 'json_schema' has 'schema', and no other has")
        return self

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, if there is one."""
        return ANY_OBJECT[self.type] if self.schema_ is None else self.schema_


ANY_OBJECT: dict[str, dict[str, Any] | None] = {"text": None, "json_object": {"type": "object"}}


class TextOptions(Body):
    """`text` of the Responses API."""

    format: TextFormat | None = None
    verbosity: None = None


class StreamOptions(Body):
    """Options of a stream of chat completions."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _disagreement(param: str, message: Any) -> PydanticCustomError:
    """A parameter that does not go with the others."""
    return PydanticCustomError("disagreement", message, {"loc": (param,)})


class ChatBody(Generation):
    """POST /v1/chat/completions"""

    FORMAT: ClassVar[str] = "response_format"
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]] | None,
        BeforeValidator(_as_list),
        WithJsonSchema({"type": ["string", "array", "null"]}),
    ] = Field(None, max_length=4)
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-PENALTY_MAX, le=PENALTY_MAX)
    frequency_penalty: float | None = Field(None, ge=-PENALTY_MAX, le=PENALTY_MAX)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-BIAS_MAX, le=BIAS_MAX)]] | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise _disagreement("top_logprobs", "needs logprobs = true")
        if self.stream_options is not None and not self.stream:
            raise _disagreement("stream_options", "needs stream = true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise _disagreement("max_completion_tokens", "differs from max_tokens; give one of them")
        return self


class ResponsesBody(Generation):
    """POST /v1/responses: stateless, so a dialogue comes as a whole in `input`."""

    FORMAT: ClassVar[str] = "text.format"
    input: Annotated[
        list[Item],
        BeforeValidator(lambda v: [{"role": "user", "content": v}] if isinstance(v, str) else v),
        WithJsonSchema({"type": ["string", "array"]}),
    ] = Field(min_length=1, max_length=MOST_MESSAGES)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextOptions | None = None


def _each_asked(value: Any) -> Any:
    """A text, several texts, or the parts of one turn -> the parts of each turn that is scored."""
    if isinstance(value, str):
        return [[{"type": "text", "text": value}]]
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return [[{"type": "text", "text": text}] for text in value]
    return [value] if isinstance(value, list) else value


class ModerationBody(Body):
    """POST /v1/moderations: one result for a text or a list of parts, one for each of a list of texts."""

    model: str | None = None
    input: Annotated[
        list[list[ChatPart]],
        BeforeValidator(_each_asked),
        WithJsonSchema({"type": ["string", "array"]}),
    ] = Field(min_length=1, max_length=64)


# --- parsing ---------------------------------------------------------------------------------------------------------


def parse(kind: type[B], text: bytes) -> B:
    """A body as `kind`. Raises ApiError 400 with the name of the first parameter that does not fit."""
    try:
        data = from_json(text, allow_inf_nan=False)
    except ValueError as err:
        raise ApiError(400, f"the body is not JSON: {err}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body is no JSON object", code="invalid_json")
    if _has_more_than(MOST_VALUES, data):
        raise ApiError(413, f"the body has more than {MOST_VALUES} values", code="too_many_values")
    try:
        json.loads(text.decode(), object_pairs_hook=no_duplicates)  # from_json takes the last of several
    except ValueError as err:
        raise ApiError(400, f"the body: {err}", code="invalid_json") from None
    given = {name: value for name, value in data.items() if value is not None}
    for name in [name for name in given if name in NEUTRAL and name not in kind.model_fields]:
        value = given.pop(name)
        if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            raise ApiError(400, _not_honoured(name), param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as err:
        raise _refusal(err) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None


def _has_more_than(most: int, data: Any) -> bool:
    """Whether JSON has more values than that, in all its objects and lists."""
    count, open_ = 1, [data]
    while open_ and count <= most:
        inner = open_.pop()
        inner = list(inner.values()) if isinstance(inner, dict) else inner
        count += len(inner)
        open_ += [value for value in inner[: most + 1] if isinstance(value, (dict, list))]
    return count > most


def _same(given: Any, neutral: Any) -> bool:
    """Equal, and not merely because Python takes true for 1."""
    return bool(given == neutral) and isinstance(given, bool) == isinstance(neutral, bool)


def _not_honoured(name: str) -> str:
    neutral = " or ".join(map(json.dumps, NEUTRAL[name]))
    return f"{name} is not supported here; leave it out" + (f" or give {neutral}" if neutral else "")


def _refusal(err: ValidationError) -> ApiError:
    """The first error, with the path of its parameter."""
    first = err.errors(include_url=False)[0]
    loc = first["loc"] or (first.get("ctx") or {}).get("loc", ())
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{path}: there is no such parameter here", param=path, code="unsupported_parameter")
    code = "missing_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{path or 'the body'}: {first['msg']}", param=path or None, code=code)
