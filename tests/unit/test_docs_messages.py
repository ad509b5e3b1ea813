"""Tests that docs/ quotes messages as the code prints them: `python -m unittest tests/unit/test_docs_messages.py`."""

import ast
import re
import unittest
from collections import defaultdict

from tests.helpers import REPOSITORY

PAGES = {  # each with the heading below which its tables quote messages
    "troubleshooting.md": "# ",
    "cluster.md": "## When something goes wrong",
    "gpu.md": "## When training falls back to ordinary steps",
}
# Quoted messages of other programs: pip, Python, Linux, torch, TensorBoard.
FOREIGN = {
    "error: externally-managed-environment",
    "ensurepip is not available",
    "No module named 'scipy.signal'",
    "No module named 'pkg_resources'",
    "No closing quotation",
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Broken pipe",
    "CUDA out of memory",
    "size mismatch",
    "Missing key(s)",
    "Unexpected key(s)",
    "'VAE' object has no attribute",
}
NGRAM = 4  # characters that a quote and a message must share before they are compared
MIN_LITERAL = 0.5  # share of a quote's characters that must stand in the message itself; the rest are inserted values
VALUE = None  # stands for an inserted value in a message


def messages_of_python(text):
    """Yields the strings of a Python file, each as a list of characters and VALUEs."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield [*node.value]
        elif isinstance(node, ast.JoinedStr):
            yield [
                item for part in node.values for item in ([*part.value] if isinstance(part, ast.Constant) else [VALUE])
            ]


def messages_of_bash(text):
    """Yields the lines of a bash script, each as a list of characters and VALUEs."""
    for line in text.splitlines():
        parts = re.split(r"\$\{[^}]*\}|\$[\w?]+|\$\([^)]*\)", line)
        yield [item for part in parts for item in [VALUE, *part]][1:]


def shared_literals(quote, message):
    """
    Returns the largest number of a quote's characters that the message itself contains, if the quote is a part of the
    message with values inserted. Returns -1 if the quote is not a part of the message.
    """
    best = dict.fromkeys(range(len(message) + 1), 0)  # by the place in the message that the quote has reached
    for character in quote:
        reached = {}
        for place, score in best.items():
            if place < len(message) and message[place] == character:
                reached[place + 1] = max(reached.get(place + 1, -1), score + 1)
            for before in [place - 1, place]:  # a value has any number of characters
                if 0 <= before < len(message) and message[before] is VALUE:
                    reached[before + 1] = max(reached.get(before + 1, -1), score)
        best = reached
    return max(best.values(), default=-1)


def quotes(page, heading):
    """Yields the quoted messages of a page: the text in backticks in the first column of the tables below a heading."""
    _, found, text = page.read_text().partition(heading)
    assert found, heading
    section = re.split(rf"^{heading.split()[0]} ", text, flags=re.MULTILINE)[0]
    for line in section.splitlines():
        if line.startswith("| "):
            yield from (
                part for parts in re.findall(r"`` (.+?) ``|`([^`]+)`", line.split(" | ")[0]) for part in parts if part
            )


def fragments(quote):
    """Returns the parts of a quote between its '...', without the messages of other programs that it contains."""
    for foreign in FOREIGN:
        quote = quote.replace(foreign, "...")
    parts = [part.strip(" ();:,") for part in quote.split("...")]
    return [part for part in parts if len(part) > 3 and part not in ["note", "warning"]]


def parts_of_fragment(fragment):
    """Returns the parts of a fragment that may come from two messages, one of which is inserted into the other."""
    parts = re.split(r"(?<=[:;,]) | (?=\()|(?<=must be) ", fragment)
    return [part for part in parts if len(re.findall(r"(?<!\S)[A-Za-z]+(?!\S)", part)) > 1]  # others may be values


class TestMessages(unittest.TestCase):
    def setUp(self):
        """Reads the messages of all programs, by the short pieces of text in them."""
        files = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("slurm/*")]
        files += [path for folder in ["harness", "sources", "pictures"] for path in (REPOSITORY / folder).glob("*.py")]
        self.messages = defaultdict(list)
        for file in files:
            read = messages_of_python if file.suffix == ".py" else messages_of_bash
            for message in read(file.read_text()):
                text = "".join(character or "\0" for character in message)
                for piece in {text[start : start + NGRAM] for start in range(len(text) - NGRAM + 1)}:
                    self.messages[piece].append(message)

    def share(self, fragment):
        """Returns the largest share of a fragment's characters that a single message contains."""
        pieces = {fragment[start : start + NGRAM] for start in range(max(len(fragment) - NGRAM + 1, 1))}
        candidates = {id(message): message for piece in pieces for message in self.messages[piece]}
        return max([shared_literals(fragment, message) for message in candidates.values()], default=-1) / len(fragment)

    def is_in_the_code(self, fragment):
        """Returns whether a fragment is a part of a message, or of two messages, one inserted into the other."""
        found = [self.share(text) >= MIN_LITERAL for text in [fragment, *parts_of_fragment(fragment)]]
        return found[0] or (len(found) > 1 and all(found[1:]))

    def test_every_quoted_message_is_in_the_code(self):
        count = 0
        for page, heading in PAGES.items():
            for quote in quotes(REPOSITORY / "docs" / page, heading):
                for fragment in fragments(quote):
                    count += 1
                    with self.subTest(page=page, quote=quote, fragment=fragment):
                        self.assertTrue(self.is_in_the_code(fragment))
        self.assertGreater(count, 90)

    def test_a_changed_quote_is_found(self):
        self.assertTrue(self.is_in_the_code("(if the data was moved, give its directory with --data_dir)"))
        self.assertFalse(self.is_in_the_code("(--data_dir says where MNIST is now)"))
        self.assertTrue(self.is_in_the_code("--lr must be a finite number above 0, got '0.1'"))
        self.assertFalse(self.is_in_the_code("--lr must be an infinite number above 0, got '0.1'"))
        self.assertEqual(shared_literals("lr 7 is", [*"--lr ", VALUE, *" is high"]), 6)
        self.assertEqual(shared_literals("lr 7 was high", [*"--lr ", VALUE, *" is high"]), 3)
        self.assertEqual(shared_literals("lr was high", [*"lr is high"]), -1)
