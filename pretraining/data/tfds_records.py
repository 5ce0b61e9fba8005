"""Datasets of TFDS: ranges of the records that lie on disk."""

import difflib
import functools
import re
from collections.abc import Callable, Iterator

from pretraining.data import text_files
from pretraining.data.text_files import Malformed
from pretraining.errors import UserError

RANGE = 1 << 16  # records that one process reads at least
_BATCH = 256  # records in memory


def ranges(source: str, data_config) -> list[tuple[int, Callable[[], Iterator[str | Malformed]]]]:
    """A split cut into ranges of records, in the order of storage.

    Args:
      source: tfds:<name>[/<config>][:<version>]:<split>.
      data_config: `config.data`; reads `text_field` and `errors`.

    Returns:
      (records, what streams their texts) of each range.

    Raises:
      UserError: no such dataset or split, or it is not prepared; on reading, no such field.
    """
    builder, split = _find(source)
    records = builder.as_data_source(split=split)
    starts = range(0, len(records), RANGE)
    numbers = [range(start, min(start + RANGE, len(records))) for start in starts]
    read = functools.partial(_texts, source, data_config, records)
    return [(len(each), functools.partial(read, each)) for each in numbers]


def identity(source: str) -> list:
    """Name with config and version, split, and its number of examples."""
    builder, split = _find(source)
    return [builder.info.full_name, split, builder.info.splits[split].num_examples]


def _texts(source: str, config, records, numbers: range) -> Iterator[str | Malformed]:
    for start in range(0, len(numbers), _BATCH):
        batch = numbers[start : start + _BATCH]
        for number, record in zip(batch, records.__getitems__(batch), strict=True):
            text = record.get(config.text_field)
            if not isinstance(text, bytes):
                raise UserError(
                    f"{source} has no text at config.data.text_field={config.text_field!r};"
                    f" its features are {', '.join(record)}"
                )
            yield text_files.decode(text, config.errors, f"{source} example {number}")


def _find(source: str):
    """The builder of a dataset that is prepared on disk, and the split.

    TFDS looks in TFDS_DATA_DIR (~/tensorflow_datasets) and where `tfds.core.add_data_dir` said.
    Nothing is downloaded here, which may take days and a disk: the error says how to do it.
    """
    import tensorflow_datasets as tfds

    match = re.fullmatch(r"tfds:([\w.+/-]+(?::[\d.*]+)?):([A-Za-z_].*)", source)
    if not match:
        raise UserError(f"config.data.corpus={source!r}: expected tfds:<name>[/<config>]:<split>")
    name, split = match.groups()
    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError:
        known = set(tfds.list_builders(with_community_datasets=False))
        close = ", ".join(difflib.get_close_matches(re.split("[:/]", name)[0], known)) or "none"
        raise UserError(
            f"{source!r}: TFDS neither knows {name!r} nor finds it prepared in"
            f" {tfds.core.constants.DATA_DIR}; names like it: {close}"
        ) from None
    except (ValueError, AssertionError, ImportError) as error:
        raise UserError(f"{source!r}: {str(error).splitlines()[0]}") from None
    _check_prepared(source, name, builder)
    _check_split(source, split, builder)
    return builder, split


def _check_prepared(source, name, builder):
    formats = {form.value for form in builder.info.available_file_formats()}
    if not builder.is_prepared() or not formats & {"array_record", "parquet"}:
        raise UserError(
            f"{source!r} is not prepared as ArrayRecord in {builder.data_path}; run: python -c"
            f' \'import tensorflow_datasets as tfds; tfds.builder("{name}",'
            ' file_format="array_record").download_and_prepare()\''
        )


def _check_split(source, split, builder):
    try:
        builder.info.splits[split]
    except (KeyError, ValueError):
        raise UserError(
            f"{source!r}: no split {split!r}; {builder.name} has {', '.join(builder.info.splits)}"
        ) from None
