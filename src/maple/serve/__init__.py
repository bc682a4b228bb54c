"""A trained method as a web page and an API. Needs `pip install 'maple-clip[serve]'`.

Knows an `Predictor` and nothing of what computes it.
"""
