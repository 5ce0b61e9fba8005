"""Is a written folder the network that was to be written?

What is read back is compared with the parameters bit for bit; and where torch and transformers are
installed, so are the logits and the ids of the classes that users will open.
"""

import importlib.util
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from pretraining import predict
from pretraining.errors import UserError
from pretraining.hugging_face import architectures, folder, weights

TOLERANCE = 1e-4  # of logits, relative to the largest

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969 two people walked on the Moon; they stayed for less than a day, and came back.",
    "def mean(values): return sum(values) / len(values)",
)


class Sample(NamedTuple):
    """What networks read in the checks.

    Attributes:
      texts: n texts.
      examples: of n texts and, last, of random ids that fill a row; of different lengths.
      before, after: ids that the objective puts around a text.
      types: {id: segment type} of those of them whose type is not 0.
    """

    texts: list[str]
    examples: Any
    before: list[int]
    after: list[int]
    types: dict[int, int]


def sample(objective, vocabulary, payload: int) -> Sample:
    """TEXTS, cut to `payload` tokens, and random ids, in the objective's own format."""
    texts = [text for text in (_cut(vocabulary, text, payload) for text in TEXTS) if text]
    rows = [predict.text_row(vocabulary, text, payload) for text in texts]
    plain = np.setdiff1d(np.arange(vocabulary.size), vocabulary.special_ids)
    drawn = np.random.default_rng(0).choice(plain, payload)
    rows.append(predict.make_row(drawn, np.zeros(payload), payload))
    one = _frame(objective, [predict.make_row(plain[:1], np.zeros(1), payload)])
    framed = one.tokens[0, : one.length[0]].tolist()
    place = framed.index(plain[0])
    types = dict(zip(framed, _segments(one)[0].tolist(), strict=False))
    types = {token: kind for token, kind in types.items() if kind}
    return Sample(texts, _frame(objective, rows), framed[:place], framed[place + 1 :], types)


def _segments(examples) -> np.ndarray:
    """[n, L] segment types; all 0 where an objective gives none."""
    return np.asarray(getattr(examples, "segments", np.zeros_like(examples.tokens)))


def _cut(vocabulary, text: str, payload: int) -> str:
    words = text.split()
    while len(vocabulary.encode(" ".join(words))) > payload:
        words.pop()
    return " ".join(words)


def _frame(objective, rows):
    batch = jax.tree.map(lambda *x: np.stack(x), *rows)
    return jax.vmap(objective.query)(batch, np.zeros((len(rows), 0), np.int32))


def check(place: pathlib.Path, name: str, objective, network, params, sample: Sample) -> list[str]:
    """Compares a written folder with a network; returns what was found equal, in words.

    Args:
      place: the folder.
      name: its class.
      objective, network: the network is one of `objective.hugging_face`.
      params: of the objective.
      sample: of `sample`.

    Raises:
      UserError: something differs.
    """
    apply = objective.model.apply
    compute = jax.jit(lambda params, example: network.logits(apply, params, example))
    again, count = _read_back(place, name, network, params)
    for example in _rows(sample.examples):
        if not np.array_equal(compute(again, example), compute(params, example)):
            raise _refusal("the parameters that are read back give other logits")
    found = [f"{count:,} numbers were read back equal bit for bit, and give the same logits"]
    if not all(importlib.util.find_spec(module) for module in ("torch", "transformers")):
        return [*found, "not opened in transformers, which or torch is not installed here"]
    logits = lambda example: np.asarray(compute(params, example))
    return [*found, _check_ids(place, sample), _check_logits(place, name, sample.examples, logits)]


def _rows(examples):
    """One by one: the logits of one row, [1, L, V], are the largest array here."""
    for row in range(len(examples.tokens)):
        yield jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], examples)


def _read_back(place, name, network, params) -> tuple[Any, int]:
    """(the parameters with those of the tensors in their places, how many numbers these are)."""
    own = traverse_util.flatten_dict(network.take(params), sep="/")
    entries = list(architectures.ARCHITECTURES[name].weights(network.config))
    lacking = {path for entry in entries for path in entry.ours} - own.keys()
    tensors = folder.read_tensors(place)
    read = weights.to_params(entries, tensors, network.config, lacking)
    wrong = sorted(
        path
        for path in read.keys() | own.keys()
        if path not in read or path not in own or not np.array_equal(read[path], own[path])
    )
    if wrong:
        raise _refusal(f"these parameters are read back as others: {', '.join(wrong)}")
    again = network.put(params, traverse_util.unflatten_dict(read, sep="/"))
    return again, sum(tensor.size for tensor in tensors.values())


def _check_ids(place, sample) -> str:
    import transformers

    tokenizer, examples = transformers.AutoTokenizer.from_pretrained(place), sample.examples
    for row, text in enumerate(sample.texts):
        length = int(examples.length[row])
        own = {
            "input_ids": np.asarray(examples.tokens)[row, :length].tolist(),
            "token_type_ids": _segments(examples)[row, :length].tolist(),
        }
        for name, theirs in tokenizer(text).items():
            if name in own and theirs != own[name]:
                raise _refusal(f"AutoTokenizer reads {text!r} as {theirs} instead of {own[name]}")
    return f"AutoTokenizer gives the same ids of {len(sample.texts)} texts"


def _check_logits(place, name, examples, logits) -> str:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    load = getattr(transformers, name).from_pretrained
    model, info = load(place, output_loading_info=True)
    if problems := {key: sorted(names) for key, names in info.items() if names}:
        raise _refusal(f"{name} does not open it as it is: {problems}")
    model, compared = model.eval(), []
    for example in _rows(examples):
        valid = np.arange(example.tokens.shape[1]) < np.asarray(example.length)[:, None]
        ours = logits(example)[valid]
        compared.append((np.abs(_theirs(model, example, valid) - ours).max(), np.abs(ours).max()))
    difference, largest = np.max(compared, axis=0)
    if not difference <= TOLERANCE * largest:
        raise _refusal(f"the logits of {name} differ by {difference:.1e} (largest {largest:.1e})")
    return f"the logits of {name} differ by at most {difference:.1e} (largest {largest:.1e})"


def _theirs(model, example, valid) -> np.ndarray:
    """The logits of a class of transformers at the valid positions."""
    import torch

    inputs = [example.tokens, valid, _segments(example)]
    tokens, mask, types = (torch.from_numpy(np.array(x)).long() for x in inputs)
    more = {"token_type_ids": types} if types.any() else {}
    with torch.no_grad():
        return model(tokens, attention_mask=mask, **more).logits.numpy()[valid]


def _refusal(reason: str) -> UserError:
    return UserError(f"nothing is exported: {reason}")
