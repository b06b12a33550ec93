"""Writes a needle question for the embedded model, as the body of a chat request.

``python -m headlong.demo.question > question.json`` prints the JSON body on standard output and the
expected answer on standard error.
"""

import argparse
import json
import sys

from transformers import AutoTokenizer

from headlong.demo.paths import MODEL_DIR
from headlong.profiling.needles import needle_prompts
from headlong.profiling.prompts import token_counter


def main() -> None:
    """Prints one question."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192, help="prompt length (default 8192)")
    parser.add_argument("--seed", type=int, default=0, help="which question (default 0)")
    parser.add_argument("--model", default="headlong-demo", help="served name")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    count = token_counter(tokenizer, chat=True)
    (prompt,) = needle_prompts(count, options.tokens, 1, options.seed)
    body = {"model": options.model, "messages": prompt.chat, "temperature": 0}
    print(json.dumps(body))
    print(f"expected answer: {prompt.fact.answer}", file=sys.stderr)


if __name__ == "__main__":
    main()
