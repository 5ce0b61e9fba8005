"""Attention from a description of who sees whom, with the kernel chosen by config.

Letters: B rows, L positions, H heads, d width of a head.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from pretraining.errors import UserError
from pretraining.models.dropout import dropout

KERNELS = ("xla", "cudnn", "splash")


@struct.dataclass
class Attention:
    """Who sees whom; never a mask, so that each kernel may use its own form of it.

    A position sees another one only where every part that is given allows it. A position that sees
    nothing (those at or beyond `length`) gets 0.

    Attributes:
      causal: a position sees itself and what stands before it.
      length: [B] int32; positions at or beyond it neither see nor are seen. None: all are valid.
      document: [B, L] int32; a position sees its own document only. None: one document.
      rank: [B, L] int32, places in an order, which need not differ; a position sees those whose
        rank is not above its own. None: no order.
    """

    causal: bool = struct.field(pytree_node=False, default=False)
    length: jax.Array | None = None
    document: jax.Array | None = None
    rank: jax.Array | None = None


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attention: Attention,
    *,
    kernel: str,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1).

    Args:
      query, key, value: [B, L, H, d], of one dtype.
      attention: who sees whom.
      kernel: one of KERNELS (`config.model.attention`).
      dropout_rate: share of the probabilities dropped; counts only where `dropout_key` is given.
      dropout_key: None = no dropout.

    Returns:
      [B, L, H, d], of the dtype of the inputs. The softmax is taken in float32.

    Raises:
      UserError: the kernel cannot serve this description, dropout, dtype, size or platform.
    """
    rate = 0.0 if dropout_key is None else dropout_rate
    check_kernel(
        kernel,
        dtype=query.dtype.name,
        dropout_rate=rate,
        by_document=attention.document is not None,
        by_rank=attention.rank is not None,
        head_width=query.shape[-1],
        sequence_length=query.shape[1],
        # splash may be compiled elsewhere for a TPU, while tracing "cudnn" needs the library.
        platform=jax.default_backend() if kernel == "cudnn" else None,
    )
    if kernel == "cudnn":
        out = _cudnn(query, key, value, attention)
    elif kernel == "splash":
        out = _splash(query, key, value, attention)
    else:
        out = _xla(query, key, value, attention, rate, dropout_key)
    if attention.length is None:
        return out
    return jnp.where(_valid(attention.length, query.shape[1])[:, :, None, None], out, 0)


def visible(
    attention: Attention, length: int, positions: jax.Array | None = None
) -> jax.Array | None:
    """[B or 1, 1, L or 1, L] bool, True where the position (third) sees the other (last).

    None: everybody sees everybody. Rows of the mask at or beyond `attention.length` mean nothing.

    Args:
      positions: [B, K] int32; instead of all L, the rows of a stream that must guess what stands at
        these positions: it sees what comes before them in the order, but not the positions
        themselves. The third dimension is then K or 1.
    """
    earlier = jnp.less_equal if positions is None else jnp.less

    def compare(sees, values):
        own = values if positions is None else jnp.take_along_axis(values, positions, axis=1)
        return sees(values[:, None, None], own[:, None, :, None])

    parts = []
    if attention.causal:
        parts.append(compare(earlier, jnp.arange(length)[None]))
    if attention.length is not None:
        parts.append(_valid(attention.length, length)[:, None, None])
    if attention.document is not None:
        parts.append(compare(jnp.equal, attention.document))
    if attention.rank is not None:
        parts.append(compare(earlier, attention.rank))
    return functools.reduce(jnp.logical_and, parts) if parts else None


def mix(
    scores: jax.Array,
    mask: jax.Array | None,
    value: jax.Array,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The values, averaged by the softmax of the scores: [B, H, K, d], of the dtype of the values.

    Args:
      scores: [B, H, K, L] float32.
      mask: what broadcasts to [B, H, K, L] bool, True where a score counts; None = everywhere.
      value: [B, H, L, d].
    """
    probabilities = dropout(softmax(scores, mask), dropout_rate, dropout_key)
    return jnp.einsum("bhlm,bhmd->bhld", probabilities.astype(value.dtype), value)


def softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[B, H, K, L] float32, the probabilities of scores; the arguments are those of `mix`.

    They are 0 where the mask is False, but all alike where it is False in a whole row.
    """
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def probabilities(query: jax.Array, key: jax.Array, attention: Attention) -> jax.Array:
    """[B, H, L, L] float32: how much each position (third) takes from the other one (last).

    What `attend` averages the values by, whatever the kernel; for people to look at. Rows at or
    beyond `attention.length` mean nothing.

    Args:
      query, key: [B, L, H, d].
    """
    query, key = (x.transpose(0, 2, 1, 3) for x in (query, key))
    return softmax(_scores(query, key), visible(attention, query.shape[2]))


def check_kernel(
    kernel: str,
    *,
    dtype: str,
    dropout_rate: float,
    by_document: bool,
    head_width: int,
    sequence_length: int,
    platform: str | None = None,
    by_rank: bool = False,
    by_distance: bool = False,
) -> None:
    """Refuses what a kernel cannot serve: nothing is ever approximated.

    Args:
      by_rank: is there an `Attention.rank`?
      by_distance: do scores depend on the distance of two positions?
      platform: what the program will run on: "cpu", "gpu" or "tpu"; None = not known yet.

    Raises:
      UserError: names `config.model.attention` and the reason.
    """
    if kernel not in KERNELS:
        raise UserError(f"config.model.attention={kernel!r} is not one of {', '.join(KERNELS)}")
    reasons = _reasons(
        kernel, dtype, dropout_rate, by_document, head_width, sequence_length, platform
    )
    for refused, reason in (*_xla_alone(kernel, by_rank, by_distance), *reasons):
        if refused:
            raise UserError(
                f"config.model.attention={kernel!r} {reason}; config.model.attention='xla' serves "
                "everything"
            )


def _xla_alone(kernel, by_rank, by_distance):
    """Pairs as in `_reasons`, of what no fused kernel has."""
    fused = kernel != "xla"
    return (
        (fused and by_distance, "has no relative positions (config.model.position='relative')"),
        (fused and by_rank, "has no order of prediction but from left to right"),
    )


def _reasons(kernel, dtype, dropout_rate, by_document, head_width, sequence_length, platform):
    """Pairs (is it so?, why that is refused)."""
    no_dropout = (
        dropout_rate > 0,
        f"has no attention dropout, but config.model.attention_dropout={dropout_rate}",
    )
    if kernel == "cudnn":
        return (
            (platform not in (None, "gpu"), f"runs on a GPU, not on platform {platform!r}"),
            no_dropout,
            (dtype == "float32", "computes in 16 bits, but config.model.dtype='float32'"),
            (by_document, "cannot keep documents apart (config.model.document_attention)"),
            (
                head_width % 8 > 0 or head_width > 256,
                "takes heads whose width is a multiple of 8 up to 256, but config.model.width / "
                f"config.model.heads = {head_width}",
            ),
        )
    if kernel == "splash":
        return (
            (platform not in (None, "tpu"), f"runs on a TPU, not on platform {platform!r}"),
            no_dropout,
            (
                sequence_length % 128 > 0,
                f"takes multiples of 128 positions, but the sequence length is {sequence_length}",
            ),
        )
    return ()


def rotary(x: jax.Array) -> jax.Array:
    """Rotates pairs of features by an angle proportional to the position (Su et al. 2021).

    The product of a rotated query and a rotated key depends on the distance of their positions.
    Departure: feature i is paired with i + d/2, as in GPT-NeoX and Llama, not with i + 1.

    Args:
      x: [B, L, H, d], d even.

    Returns:
      [B, L, H, d], of the same dtype; computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.outer(jnp.arange(x.shape[1], dtype=jnp.float32), frequency)[None, :, None]
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _xla(query, key, value, attention, rate, dropout_key):
    """The reference: every description, attention dropout."""
    # On CPUs the products are up to 10 % faster with the heads beside the rows.
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    scores = _scores(query, key)
    out = mix(scores, visible(attention, query.shape[2]), value, rate, dropout_key)
    return out.transpose(0, 2, 1, 3)


def _scores(query, key):
    """[B, H, L, L] float32 of [B, H, L, d]."""
    query = query * query.shape[-1] ** -0.5
    return jnp.einsum("bhld,bhmd->bhlm", query, key, preferred_element_type=jnp.float32)


def _valid(length, positions):
    """[B, L] bool: the positions before `length` [B]."""
    return jnp.arange(positions)[None] < length[:, None]


def _cudnn(query, key, value, attention):
    # A row that sees nothing is undefined there: it sees one key, and `attend` discards the result.
    length = None if attention.length is None else jnp.maximum(attention.length, 1)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=attention.causal,
        query_seq_lengths=length,
        key_value_seq_lengths=length,
        implementation="cudnn",
    )


def _splash(query, key, value, attention):
    """Splash attention for TPU; documents and padding are its segments.

    It is not partitioned by the compiler: under a mesh (`jax.set_mesh`) each device runs its own
    rows and heads.
    """
    segment = _segments(attention, query.shape[:2])
    query = query * query.shape[-1] ** -0.5
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _splash_local(query, key, value, segment, attention.causal)
    rows = tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)
    heads = "tensor" if "tensor" in mesh.axis_names else None
    spec = PartitionSpec(rows, None, heads)
    return jax.shard_map(
        lambda *arrays: _splash_local(*arrays, attention.causal),
        in_specs=(spec, spec, spec, PartitionSpec(rows)),
        out_specs=spec,
        check_vma=False,
    )(query, key, value, segment)


def _segments(attention, shape):
    """[B, L] int32: equal where positions may see each other; the padding is one of its own."""
    document = attention.document
    document = jnp.zeros(shape, jnp.int32) if document is None else document
    if attention.length is None:
        return document
    return jnp.where(_valid(attention.length, shape[1]), document, jnp.iinfo(jnp.int32).min)


def _splash_local(query, key, value, segment, causal):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = query.shape[1:3]
    mask = splash.CausalMask if causal else splash.FullMask
    block = next(size for size in (512, 256, 128) if length % size == 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask((length, length))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
    )
    per_row = jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s)))
    outward = lambda x: x.transpose(0, 2, 1, 3)
    return outward(per_row(outward(query), outward(key), outward(value), segment))
