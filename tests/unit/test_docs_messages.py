"""Tests that docs/ quotes messages as the code prints them: `python -m unittest tests/unit/test_docs_messages.py`."""

import ast
import re
import unittest

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
VALUE = "\0"  # stands for a value that is inserted into a message
MARKS = '();:,.|`"'  # stripped from both ends of each word


def messages_of_python(text):
    """Yields the strings of a Python file, with VALUE for each inserted value."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)


def messages_of_bash(text):
    """Yields the lines of a bash script, with VALUE for each inserted value."""
    for line in text.splitlines():
        yield re.sub(r"\$\{[^}]*\}|\$[\w?]+|\$\([^)]*\)", VALUE, line)


def words(text):
    """Returns the words of a text, without punctuation marks around them."""
    return [word.strip(MARKS) for word in text.split() if word.strip(MARKS)]


def matches(quoted, message):
    """
    Returns whether the words of a quote are a part of the words of a message. A value in the message matches any text
    without spaces, but a third of the words must have no value.
    """

    def is_same(found, word):
        return found == word if VALUE not in word else re.fullmatch(re.escape(word).replace(VALUE, r"\S*"), found)

    starts = range(len(message) - len(quoted) + 1)
    parts = [message[start : start + len(quoted)] for start in starts]
    return any(
        all(map(is_same, quoted, part)) and 3 * sum(VALUE not in word for word in part) >= len(part) for part in parts
    )


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
    return [part for part in quote.split("...") if len(words(part)) > 1]  # a single word may be a value or a flag


def parts_of_fragment(fragment):
    """Returns the parts of a fragment that may come from two messages, one of which is inserted into the other."""
    parts = re.split(r"(?<=[:;,]) | (?=\()|(?<=must be) ", fragment)
    return [part for part in parts if len(words(part)) > 1]  # a single word may be a value


class TestMessages(unittest.TestCase):
    def setUp(self):
        """Reads the messages of all programs."""
        files = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("slurm/*")]
        files += [path for folder in ["harness", "sources", "pictures"] for path in (REPOSITORY / folder).glob("*.py")]
        self.messages = []
        for file in files:
            read = messages_of_python if file.suffix == ".py" else messages_of_bash
            self.messages += map(words, read(file.read_text()))

    def is_in_the_code(self, fragment):
        """Returns whether a fragment is a part of a message, or of two messages, one inserted into the other."""

        def is_found(text):
            return any(matches(words(text), message) for message in self.messages)

        parts = parts_of_fragment(fragment)
        return is_found(fragment) or (len(parts) > 0 and all(map(is_found, parts)))

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
        self.assertTrue(matches(words("--lr 7 is high"), words(f"--lr {VALUE} is high: lower it")))
        self.assertFalse(matches(words("--lr 7 was high"), words(f"--lr {VALUE} is high: lower it")))
