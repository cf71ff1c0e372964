"""The only place with algorithm maths: MEMIT (arXiv 2210.07229), its statistics, its oracle and its measurements."""
