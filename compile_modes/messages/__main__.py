"""``python -m compile_modes.messages`` prints the catalogue, as the documentation has it."""

from compile_modes.messages.page import markdown

print(markdown(), end="")
