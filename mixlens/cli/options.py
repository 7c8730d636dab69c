"""Options shared by several commands, and the types of their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from cyclopts import Parameter, Token, validators

from mixlens.endpoints.protocols import WireProtocol

if TYPE_CHECKING:
    from mixlens.recording.corpus import RecordSettings
    from mixlens.recording.documents import Documents

Dtype = Literal["float32", "bfloat16", "float16"]


def _whole(_type: Any, tokens: Sequence[Token]) -> int:
    text = tokens[0].value
    if not text.strip().removeprefix("-").isdecimal():  # cyclopts would round 1.5
        raise ValueError(f"{text!r} is not a whole number.")
    return int(text)


Whole = Annotated[int, Parameter(converter=_whole)]
Positive = Annotated[int, Parameter(converter=_whole, validator=validators.Number(gte=1))]
NotNegative = Annotated[int, Parameter(converter=_whole, validator=validators.Number(gte=0))]
Dollars = Annotated[float, Parameter(validator=validators.Number(gt=0))]
Seconds = Annotated[float, Parameter(validator=validators.Number(gt=0))]


def _list_of(kind: type[int] | type[float], example: str) -> Any:
    def read(_type: Any, tokens: Sequence[Token]) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in tokens[0].value.split(","))
        except ValueError:
            raise ValueError(f"{tokens[0].value!r} is not a list of numbers such as {example}.") from None

    return read


def _names(_type: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple(name.strip() for name in tokens[0].value.split(",") if name.strip())


def _signals(_type: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    from mixlens.errors import BadInput
    from mixlens.trace.signals import parse_signals

    names = _names(_type, tokens)
    try:
        parse_signals(names, layers=[0])  # checks the names only; layers are not known before loading
    except BadInput as error:
        raise ValueError(str(error)) from error
    return names


def _dtypes(_type: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    names = _names(_type, tokens)
    if unknown := [name for name in names if name not in get_args(Dtype)]:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(get_args(Dtype))}.")
    return names


def quantization_of(text: str) -> str | dict[str, str]:
    """Parse the quantization argument of `load` from text such as "nf4" or "attention=nf4,experts=hqq2".

    Raises ValueError for an unknown scheme.
    """
    from mixlens.errors import BadInput
    from mixlens.models.quantization.schemes import parse_scheme

    parts = [entry.rpartition("=") for entry in text.split(",")] if "=" in text else [("", "", text)]
    for _, _, scheme in parts:
        try:
            parse_scheme(scheme)
        except BadInput as error:
            raise ValueError(str(error)) from error
    return text if "=" not in text else {part: scheme for part, _, scheme in parts}


def schemes_of(text: str) -> list[str | dict[str, str] | None]:
    """Parse several schemes or dtypes, separated by semicolons, or by commas if no scheme names parts of the model."""
    divided = text.split(";") if ";" in text or "=" in text else text.split(",")
    named = [scheme.strip() for scheme in divided if scheme.strip()]
    plain: dict[str, str | None] = {"none": None, **{dtype: dtype for dtype in get_args(Dtype)}}
    return [plain[scheme] if scheme in plain else quantization_of(scheme) for scheme in named]


_SLO = {"ttft": "ttft_s", "tpot": "tpot_s", "e2e": "e2e_token_s"}


def _slo(_type: Any, tokens: Sequence[Token]) -> Any:
    from mixlens.bench.metrics import Limits

    text = tokens[0].value
    try:
        given = {_SLO[name.strip()]: float(value) for name, _, value in (one.partition("=") for one in text.split(","))}
        return Limits(**given)
    except (KeyError, ValueError):
        raise ValueError(f"{text!r} is not a list of limits in seconds such as ttft=0.5,tpot=0.05,e2e=10.") from None


Slo = Annotated[Any, Parameter(converter=_slo, n_tokens=1, metavar="ttft=S,tpot=S")]
Integers = Annotated[tuple[int, ...], Parameter(converter=_list_of(int, "0,15,31"), n_tokens=1, metavar="N,N,...")]
Numbers = Annotated[tuple[float, ...], Parameter(converter=_list_of(float, "0.5,2"), n_tokens=1, metavar="R,R,...")]
Names = Annotated[tuple[str, ...], Parameter(converter=_names, n_tokens=1, metavar="NAME,NAME,...")]
Signals = Annotated[tuple[str, ...], Parameter(converter=_signals, n_tokens=1, metavar="NAME,NAME,...")]
Dtypes = Annotated[tuple[str, ...], Parameter(converter=_dtypes, n_tokens=1, metavar="NAME,NAME,...")]
Quantization = Annotated[
    Any, Parameter(converter=lambda _, tokens: quantization_of(tokens[0].value), n_tokens=1, metavar="SCHEME")
]
Schemes = Annotated[
    Any, Parameter(converter=lambda _, tokens: schemes_of(tokens[0].value), n_tokens=1, metavar="S,S,...")
]


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """Options for the output of a command.

    Parameters
    ----------
    json
        Print the result as JSON.
    quiet
        Print only the result, without progress and loading messages.
    config
        YAML file with options under the same names. Options on the command line take precedence.
    """

    json: bool = False
    quiet: bool = False
    config: str | None = None

    @property
    def progress(self) -> bool:
        return not (self.json or self.quiet)


@Parameter(name="*")
@dataclass(frozen=True)
class Loading:
    """Options for loading a model.

    Parameters
    ----------
    quantization
        Scheme such as nf4, int8 or hqq2-g16, or one per part: "attention=nf4,experts=hqq2,*.layers.0.*=none".
    device_map
        Device map as in accelerate, such as "auto" or "cpu".
    dtype
        Dtype of weights that are not quantized.
    revision
        Branch, tag or commit on the Hub.
    """

    quantization: Quantization = None
    device_map: str | None = None
    dtype: Dtype | None = None
    revision: str | None = None

    def skeleton(self, model: str) -> Any:
        """Return the model without its weights, for checks that need not load them."""
        from mixlens.models.load import skeleton

        return skeleton(model, revision=self.revision, dtype=self.dtype)

    def load(self, model: str, output: Output) -> Any:
        from mixlens.models.load import load

        return load(model, **vars(self), verbose=output.progress)


@Parameter(name="*")
@dataclass(frozen=True)
class Reading:
    """Options for reading documents.

    Parameters
    ----------
    text
        Column with the text, or with a chat as messages with role and content.
    columns
        Columns to keep besides the text and the id. By default all.
    split
        Split of a data set that has several.
    limit
        Only the first N documents of every source.
    max_length
        Maximum tokens per sequence. By default the context length of the model.
    overlong
        Treatment of longer documents.
    batch_tokens
        Tokens per forward pass.
    """

    text: str = "text"
    columns: Names | None = None
    split: str | None = None
    limit: Positive | None = None
    max_length: Positive | None = None
    overlong: Literal["error", "truncate", "split"] = "error"
    batch_tokens: Positive | None = None

    def settings(self, base: RecordSettings, output: Output) -> RecordSettings:
        how = {name: getattr(self, name) for name in ("max_length", "overlong", "batch_tokens")}
        return replace(base, **how, progress=output.progress)

    def documents(self, sources: Sequence[str], *, by: str | None = None) -> Documents:
        """Return the checked documents of all sources.

        Raises BadInput if a source cannot be read, if documents cannot be recorded, or if they lack the column `by`.
        """
        from mixlens.recording.documents import Documents
        from mixlens.recording.sources import documents

        how = {"text": self.text, "columns": self.columns, "split": self.split, "limit": self.limit}
        checked = Documents([found for source in sources for found in documents(source, **how)], "text")
        if by is not None and not {by, f"document_{by}"} & {*checked.columns, "document_id"}:
            from mixlens.errors import BadInput

            raise BadInput(
                f"Cannot group by {by!r}: the documents have the columns {', '.join(checked.columns) or '(none)'}. "
                "Pass one of them as --by.",
                argument="--by",
                value=by,
            )
        return checked


@Parameter(name="*")
@dataclass(frozen=True)
class Server:
    """Options for requests to an endpoint.

    Parameters
    ----------
    model
        Name of the model on the server. Optional for openrouter, deepinfra and modelslab.
    protocol
        Protocol of the endpoint. By default openai-chat.
    key_env
        Environment variable with the key.
    provider
        For openrouter: only this provider may answer.
    """

    model: str | None = None
    protocol: WireProtocol | None = None
    key_env: str | None = None
    provider: str | None = None

    def endpoint(self, url: str) -> Any:
        """Return the Endpoint at `url`, which may be the name of a preset.

        Raises BadInput if no model is given, or if a provider is given for an address other than OpenRouter's.
        """
        from mixlens.endpoints.endpoint import PRESETS, Endpoint
        from mixlens.errors import BadInput

        named = {"model": self.model, "protocol": self.protocol, "key_env": self.key_env}
        fields: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if self.provider is not None and url != "openrouter":
            raise BadInput(
                f"Cannot choose the provider {self.provider!r} at {url}: only OpenRouter chooses between providers. "
                "Pass openrouter as the URL, or leave out --provider.",
                argument="--provider",
                value=self.provider,
            )
        if url in PRESETS:
            pinned = {"providers": [self.provider]} if self.provider else {}
            return PRESETS[url](**fields, **pinned)
        if self.model is None:
            raise BadInput(
                f"Cannot use {url}: no model is given. Pass its name on the server as --model.", argument="--model"
            )
        return Endpoint(url, **fields)
