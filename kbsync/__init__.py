"""kbsync keeps the facts inside a language model fresh."""
