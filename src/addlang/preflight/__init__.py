"""``addlang preflight``: before any training, can this model be adapted with these data, and what will it cost?"""
