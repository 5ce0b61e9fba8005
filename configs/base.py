"""What every recipe shares: each section and each key with its default and its meaning.

A recipe (`configs/<name>.py`) calls `get_config()` and changes what it must; the command line
changes the rest: `--config.train.steps=2000`. Durations are an int (steps) or a string:
"500 steps", "10M tokens", "2 epochs", "10%" (of the whole run).
"""

import ml_collections
from ml_collections import config_dict

from pretraining.errors import UserError


def free(value):
    """A key whose value may change its type (a duration, a source or a list of sources)."""
    return config_dict.FieldReference(value, field_type=object)


def get_config() -> ml_collections.ConfigDict:
    """The shared defaults; not runnable alone, because no objective is named."""
    return ml_collections.ConfigDict(
        dict(
            objective=objective(),
            model=model(),
            data=data(),
            tokenizer=tokenizer(),
            optimizer=optimizer(),
            mesh=mesh(),
            train=train(),
            seed=seed(),
            evaluate=evaluate(),
            checkpoint=checkpoint(),
            guard=guard(),
            log=log(),
            # Start from the parameters of another run, "workdir" or "workdir@step", or of a folder
            # in the layout of transformers, whose tokenizer is then taken too
            init_from="",
            init_optimizer=False,  # take over its optimizer state and moving average too
        )
    )


def at_size(sizes: dict, size: str, objective: dict) -> ml_collections.ConfigDict:
    """The shared defaults with the keys of an objective, changed as `sizes[size]` says.

    Raises:
      UserError: there is no such size.
    """
    if size not in sizes:
        raise UserError(
            f"configs/{objective['name']}.py:{size}: no such size, there are {', '.join(sizes)}"
        )
    config = get_config()
    config.objective = objective
    config.update(sizes[size])
    return config


def objective():
    return dict(
        name="",  # the file in objectives/ that is trained
    )


def model():
    return dict(
        layers=12,  # Transformer blocks
        width=768,  # D, of the residual stream
        heads=12,  # attention heads; must divide width
        mlp_width=3072,  # inner width of the feed-forward block
        embedding_width=0,  # of the embeddings; 0 = width, else a projection follows (ELECTRA)
        position="learned",  # learned | rotary | relative (two-stream networks: XLNet) | none
        position_rows=0,  # rows of the learned table; 0 = data.sequence_length
        position_offset=0,  # first row used (RoBERTa: 2)
        segments=0,  # rows of the segment-type table; 0 = no segment embedding (BERT: 2)
        embedding_norm=True,  # norm (and dropout) after the embedding sum; False: dropout alone
        norm="layernorm",  # layernorm | rmsnorm
        norm_order="post",  # post (BERT) | pre (GPT-2: a final norm closes the stack)
        norm_epsilon=1e-12,  # added to the variance
        # gelu_tanh (BERT, GPT-2) | gelu_erf (RoBERTa, ELECTRA) | relu | silu
        activation="gelu_tanh",
        gated=False,  # gated feed-forward: GeGLU with a gelu, SwiGLU with silu
        bias=True,  # biases in projections and norms
        dropout=0.1,  # after embeddings and on each sub-layer's output
        attention_dropout=0.1,  # on attention probabilities
        init_std=0.02,  # normal, truncated at 2 sd, for kernels and embeddings
        position_init_std=0.0,  # the same for learned positions; 0 = init_std (GPT-2: 0.01)
        head_transform=True,  # dense + activation + norm before the output projection (BERT)
        head_bias=True,  # bias of the output projection (BERT: yes, GPT-2: no)
        tie_head=True,  # the output projection is the token embedding
        logits_chunk=32,  # positions of a row whose logits exist at once
        dtype="float32",  # compute: float32 | bfloat16; parameters and reductions stay float32
        # kernel: xla (serves everything) | cudnn (GPU, dropout 0) | splash (TPU, dropout 0)
        attention="xla",
        execution="unrolled",  # layers unrolled | scanned (compile time flat in depth)
        # what the backward pass recomputes of each layer: none | dots (all but the products with
        # weights) | outputs (all but what attention and feed-forward give) | full (all)
        remat="none",
        document_attention=False,  # True: the documents of a row don't see each other
    )


def data():
    return dict(
        # A source, or a tuple of (source, weight): "python-docs", "tfds:<name>[/<config>]:<split>",
        # or a path or glob of .txt .jsonl .parquet, plain or .gz .xz .zst
        corpus=free("python-docs"),
        text_field="text",  # field of the text in .jsonl, .parquet and TFDS
        txt_documents="blank",  # what ends a document in .txt: blank (line) | line | file
        # malformed text: strict (stop, with file and place) | replace (what is not UTF-8 becomes
        # U+FFFD, the rest stops) | skip (leave the document out, and count it)
        errors="strict",
        validation=0.02,  # share of documents held out, chosen by the hash of their text
        sequence_length=128,  # L, positions of the model; a row holds T = L - 3 tokens
        copies=1,  # times each row stands in a batch; masked copies have disjoint targets
        cache="",  # folder of token stores; "" = $PRETRAINING_CACHE or ~/.cache/pretraining
        workers=0,  # processes that prepare; 0 = one per core
        prefetch=4,  # batches made ahead of the step, off the main thread; 0 = none
        threads=4,  # threads that read rows
    )


def tokenizer():
    return dict(
        # an existing one, with its own ids: a SentencePiece .model, a tokenizer.json or a folder in
        # Hugging Face's layout; "" = train one on the corpus
        model="",
        kind="unigram",  # unigram | bpe
        size=4096,  # V, pieces of a trained vocabulary, specials included
        character_coverage=0.9995,  # share of characters with a piece of their own
        byte_fallback=True,  # other characters become bytes; False: unk
        # nmt_nfkc | nfkc | nmt_nfkc_cf | nfkc_cf (case folded) | identity
        normalization="nmt_nfkc",
        sample_bytes=20_000_000,  # of training text that the trainer reads, a deterministic sample
    )


def optimizer():
    return dict(
        name="adamw",  # adamw | bert_adam (no bias correction) | lamb | muon
        learning_rate=1e-4,  # peak
        # linear | cosine | constant | wsd (warm-up, stable, decay) | bert | electra
        schedule="linear",
        warmup=free("10%"),  # duration of the rise from 0 to the peak
        decay=free("20%"),  # duration of the last phase of wsd
        end_fraction=0.0,  # learning rate at the end, as a share of the peak
        beta1=0.9,  # decay of the gradient's average
        beta2=0.999,  # decay of its square's average
        epsilon=1e-6,  # added to the square root of that
        weight_decay=0.01,  # decoupled
        # parameters that are not decayed: regular expressions searched for in "encoder/layer_0/..."
        decay_exclude=("bias$", "norm", "scale$"),
        clip=1.0,  # largest global norm of the gradient; 0 = off
    )


def mesh():
    return dict(
        data=-1,  # devices that hold different rows and the same parameters; -1 = all that are left
        fsdp=1,  # devices that hold different rows and share the parameters out
        tensor=1,  # devices that share heads, feed-forward and vocabulary
    )


def train():
    return dict(
        steps=free(1000),  # duration: optimizer updates
        batch_size=64,  # B, rows of the global batch
        accumulation=1,  # microbatches of one update; must divide batch_size
        ema=0.0,  # decay of the moving average of the parameters; 0 = none
    )


def seed():
    return dict(
        init=0,  # parameters
        data=0,  # order of rows
        corruption=0,  # masks
        dropout=0,  # what is dropped
        evaluation=0,  # masks of the evaluation, fixed for the whole run
    )


def evaluate():
    return dict(
        every=free(200),  # duration between evaluations; 0 = at the end only
        rows=512,  # rows of the validation split used, from its start; 0 = all
        batch_size=64,  # rows evaluated at once; changes no figure but in the last bits
        # further validation corpora: tuple of (name, source); logged as eval/<name>/loss
        sets=(),
    )


def checkpoint():
    return dict(
        every=free(200),  # duration between saves; 0 = at the end only
        keep=3,  # newest checkpoints kept
        keep_every=free(0),  # every n-th (a duration) is kept for ever; 0 = none
    )


def guard():
    return dict(
        # an update whose loss or gradient is not finite changes nothing, and then: stop | skip (go
        # on, and count it); its batch is kept in <workdir>/offending
        non_finite="stop",
        # a loss that lies this many standard deviations above the average is a spike; it is told,
        # and its batch is kept; 0 = not looked for
        spike=0.0,
        spike_memory=200,  # updates that the average remembers
        # times that a spike takes the run back to the last checkpoint, to go on with other rows
        rewinds=0,
        # seconds after which a process without a sign of life, or one that stands still while
        # making steps (elsewhere: ten times as long), is reported by the others, which then end;
        # longer than any step and any stall of the file system; 0 = never
        silence=300.0,
    )


def log():
    return dict(
        every=10,  # steps between lines
        tensorboard=True,  # event files in <workdir>/tensorboard
        wandb="",  # Weights & Biases project; "" = off; WANDB_MODE=offline works
        profile_start=0,  # step at which a profile begins; 0 = none
        profile_steps=5,  # steps in the profile
        # FLOP/s of one device, the denominator of MFU; 0 = the published bfloat16 peak of a known
        # accelerator, or a measured float32 matmul on others
        peak_flops=0.0,
    )
