"""See what an objective does to a text: in a terminal, as a picture.

    shown = show.read(run, "A text of a few words.")
    print(show.text(shown, width=100))
    show.figure(shown).savefig("show.png", dpi=150)

What is shown is the example that the loss reads, by `Objective.describe`; no objective is known
here. The command is `python -m pretraining.show`, in `__main__.py`.
"""

from pretraining import lazy

__all__ = ["figure", "read", "text"]

__getattr__ = lazy.names(
    __name__, figure="picture.figure", read="example.read", text="terminal.text"
)
