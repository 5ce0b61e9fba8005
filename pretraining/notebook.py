"""Reading a run in a notebook, on a CPU, whatever wrote it.

run = pretraining.load("runs/mlm")
run.metrics.plot(y="eval/loss")
run.fill_mask("The function returns a [MASK] of the list.", k=5)
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from pretraining import checkpoint, compilation_cache, metrics, observe, predict, run_folder
from pretraining import config as config_lib
from pretraining.data.row import SPECIAL_POSITIONS, WORD_START
from pretraining.data.tokenizer import Vocabulary
from pretraining.errors import UserError

MASK = "[MASK]"  # how a mask is written in the text of `fill_mask`


def load(workdir: str | pathlib.Path, step: int | None = None, ema: bool = False) -> "Run":
    """Opens a run folder on the CPU.

    What this process compiles is then kept in the project's cache (`compilation_cache.use`), as in
    training, unless it has chosen a place of its own.

    Args:
      workdir: folder of the run.
      step: checkpoint; None = the newest.
      ema: the moving average of the parameters instead of the parameters.

    Raises:
      UserError: no run or no such checkpoint there, or no moving average in it.
    """
    folder = run_folder.locate(workdir)
    config = run_folder.stored_config(folder)
    compilation_cache.use(config.data)
    with config.unlocked():
        config.model.attention = "xla"  # the kernels of accelerators don't run here
    vocabulary = Vocabulary.load(folder / run_folder.VOCABULARY)
    params, step = checkpoint.load_parameters(folder / run_folder.CHECKPOINTS, step, ema)
    params = jax.device_put(params, jax.local_devices(backend="cpu")[0])
    objective = config_lib.build_objective(config, vocabulary)
    return Run(folder, config, vocabulary, objective, params, step)


@dataclasses.dataclass(frozen=True)
class Run:
    """One checkpoint of a run and what it can do.

    Attributes:
      folder: the run folder.
      config: its resolved config.
      vocabulary: its Vocabulary.
      objective: its Objective, for whoever wants the pure functions.
      params: parameter tree on the CPU, float32.
      step: the checkpoint's step.
    """

    folder: pathlib.Path
    config: Any
    vocabulary: Vocabulary
    objective: Any
    params: Any
    step: int

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"Run({str(self.folder)!r}, step {self.step}, {count:,} parameters)"

    @property
    def payload(self) -> int:
        """T: tokens of text that one row of the model takes."""
        return self.config.data.sequence_length - SPECIAL_POSITIONS

    @functools.cached_property
    def metrics(self):
        """metrics.jsonl as a pandas frame, indexed by step."""
        import pandas

        lines = metrics.read(self.folder / metrics.FILE)
        return pandas.DataFrame(lines).set_index("step") if lines else pandas.DataFrame()

    def encode(self, texts: list[str], layer: int = -1) -> list[np.ndarray]:
        """Vectors of every token: one array [tokens, D] per text.

        Args:
          texts: each at most `payload` tokens long.
          layer: 0 = the embeddings, i = after block i, -1 = the last.

        Raises:
          UserError: a text is empty or too long, or there is no such layer.
        """
        if self.objective.encode is None:
            raise UserError("encode is not available: the objective has no part `encode`")
        layers = self.config.model.layers
        if not -layers - 1 <= layer <= layers:
            raise UserError(f"layer={layer}: this model has layers 0 (embeddings) to {layers}")
        rows = [predict.text_row(self.vocabulary, text, self.payload) for text in _texts(texts)]
        vectors = predict.encode(self.objective, self.params, rows, layer)
        return [found[: row.length] for found, row in zip(vectors, rows, strict=True)]

    def fill_mask(self, text: str, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each [MASK] in the text, the k likeliest pieces: [(piece, probability), ...].

        Each [MASK] stands for one piece that begins a word, unless text directly precedes it.
        """
        predict.require(self.objective, "fill_mask", context="both")
        tokens, boundary, positions = self._mask_text(text)
        row = predict.make_row(tokens, boundary, self.payload)
        values = predict.log_probs(self.objective, self.params, [row], np.array([positions]))[0]
        return [self._likeliest(value, k) for value in values]

    def _mask_text(self, text: str) -> tuple[list[int], list[int], list[int]]:
        parts = text.split(MASK)
        if len(parts) < 2:
            raise UserError(f"fill_mask: the text has no {MASK}: {text!r}")
        tokens, boundary, positions = [], [], []
        for number, part in enumerate(parts):
            if number:
                positions.append(len(tokens))
                tokens.append(self.vocabulary.mask)
                starts_word = not parts[number - 1] or parts[number - 1][-1].isspace()
                boundary.append(WORD_START if starts_word else 0)
            if number < len(parts) - 1:
                part = part.removesuffix(" ")  # the space belongs to the word that is masked
            if part.strip():
                ids, flags = self.vocabulary.encode_document(part, continues=number > 0)
                tokens += ids.tolist()
                boundary += flags.tolist()
        return tokens, boundary, positions

    def _likeliest(self, log_probs: np.ndarray, k: int) -> list[tuple[str, float]]:
        best = np.argsort(log_probs)[::-1][:k].tolist()
        pieces = self.vocabulary.pieces(best)
        return [(piece, float(np.exp(log_probs[i]))) for piece, i in zip(pieces, best, strict=True)]

    def generate(
        self,
        prompt: str,
        tokens: int = 50,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """Continues a prompt, token by token, until the end of the document or `tokens` more.

        Args:
          prompt: text; its last `payload` - 1 tokens are what the model sees.
          tokens: most tokens to add.
          temperature: 0 = always the likeliest.
          top_k: sample among the k likeliest; 0 = all.
          top_p: sample among the likeliest whose probabilities first sum to top_p (Holtzman et al.
            2020).
          seed: the same seed gives the same text.
        """
        predict.require(self.objective, "generate", context="left")
        for name, value, allowed, valid in (
            ("temperature", temperature, "at least 0", temperature >= 0),
            ("top_k", top_k, "at least 0", top_k >= 0),
            ("top_p", top_p, "in (0, 1]", 0 < top_p <= 1),
        ):
            if not valid:
                raise UserError(f"generate: {name}={value} is out of range: {allowed}")
        ids = list(self.vocabulary.encode(prompt))
        generator = np.random.default_rng(seed)
        for _ in range(tokens):
            seen = ids[-(self.payload - 1) :]
            row = predict.make_row(seen, np.zeros(len(seen)), self.payload, "the prompt")
            values = predict.log_probs(self.objective, self.params, [row], np.array([[len(seen)]]))
            chosen = _sample(values[0, 0], temperature, top_k, top_p, generator)
            if chosen == self.vocabulary.eos:
                break
            ids.append(chosen)
        return self.vocabulary.decode(ids)

    def score(self, texts: list[str], per_token: bool = False) -> np.ndarray | list[np.ndarray]:
        """How likely each text is (nats): [n], or one array of token values per text.

        The log-likelihood, exact, for objectives that see the left (the first token given the start
        symbol); the pseudo-log-likelihood for those that see both sides, each token hidden alone
        and all others visible (Salazar et al. 2020); an objective's own `score` where it has one:
        a discriminator's log-probability that the token is the original one. Special tokens count
        nothing. Scores of different kinds do not compare.
        """
        predict.require(self.objective, "score")
        rows = [predict.text_row(self.vocabulary, text, self.payload) for text in _texts(texts)]
        values = [
            predict.token_scores(self.objective, self.params, row, self.vocabulary.special_ids)
            for row in rows
        ]
        return values if per_token else np.array([value.sum() for value in values])

    def colour(self, text: str):
        """The text with a colour for each token by its `score`, as HTML: red = unlikely.

        Special tokens, which have no score, are grey.
        """
        from pretraining import display

        (values,) = self.score([text], per_token=True)
        ids, _ = self.vocabulary.encode_document(text)
        known = ~np.isin(ids, self.vocabulary.special_ids)
        return display.coloured(self.vocabulary.pieces(ids), np.where(known, values, np.nan))

    def attention(self, text: str) -> observe.AttentionMap:
        """Who takes how much from whom, in every layer and head, when the whole text is read.

        Of two streams it is the content stream, and of two networks the one that is trained
        further, `encoder`.

        Raises:
          UserError: the text is empty or too long, or the objective has no such network.
        """
        row = predict.text_row(self.vocabulary, text, self.payload)
        ids, probabilities = observe.attention(self.objective, self.params, row)
        return observe.AttentionMap(self.vocabulary.pieces(ids), probabilities)

    def neighbours(self, piece: str, k: int = 10) -> list[tuple[str, float]]:
        """The k other pieces whose embeddings have the highest cosine: [(piece, cosine), ...].

        Args:
          piece: as the vocabulary writes it, or a word that is one piece.

        Raises:
          UserError: it is neither, or the network has no table of tokens.
        """
        table = observe.token_table(self.params)
        own = self._piece(piece)
        order, cosines = observe.nearest(table, table[own])
        left_out = {own, *self.vocabulary.special_ids}
        kept = [(i, c) for i, c in zip(order.tolist(), cosines, strict=True) if i not in left_out]
        pieces = self.vocabulary.pieces([i for i, _ in kept[:k]])
        return [(name, float(c)) for name, (_, c) in zip(pieces, kept, strict=False)]

    def _piece(self, piece: str) -> int:
        """The id of a piece, or of a word that is one."""
        everything = self.vocabulary.pieces(range(self.vocabulary.size))
        if piece in everything:
            return everything.index(piece)
        ids = self.vocabulary.encode(piece)
        if len(ids) != 1:
            parts = " ".join(self.vocabulary.pieces(ids))
            raise UserError(f"neighbours: {piece!r} is no piece of the vocabulary, but {parts!r}")
        return ids[0]

    def show(self, text: str, seed: int | None = None):
        """What the objective does to a text, as a matplotlib figure.

        The example is the one that the loss would read if the text were the first row of the next
        batch; `python -m pretraining.show` prints it too.

        Args:
          text: at most `payload` tokens long.
          seed: of the corruption, instead of `config.seed.corruption`.

        Raises:
          UserError: the text is empty or too long, or the objective cannot be shown.
        """
        from pretraining import show

        return show.figure(show.read(self, text, seed))

    def plot(self):
        """Loss curves, with the unigram baseline, as a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.subplots()
        curves = (
            ("train/loss", "training", dict(alpha=0.45, lw=1)),
            ("eval/loss", "validation", dict(marker="o", ms=3)),
            ("eval/unigram_loss", "unigram baseline", dict(ls="--", color="0.4")),
        )
        for column, label, style in curves:
            if column in self.metrics:
                values = self.metrics[column].dropna()
                axes.plot(values.index, values, label=label, **style)
        axes.set(xlabel="step", ylabel="loss (nats)", title=self.folder.name)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure


def _texts(texts) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _sample(log_probs, temperature: float, top_k: int, top_p: float, generator) -> int:
    """One id from log-probabilities [V]."""
    order = np.argsort(-log_probs, kind="stable")
    if temperature == 0:
        return int(order[0])
    logits = log_probs[order].astype(np.float64) / temperature
    probabilities = np.exp(logits - logits[0])
    if top_k:
        probabilities[top_k:] = 0
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    probabilities[before >= top_p] = 0  # the first is always kept
    return int(generator.choice(order, p=probabilities / probabilities.sum()))
