"""A trained method as a web page and an HTTP API. Needs `pip install 'maple-clip[serve]'`.

Depends on `maple.inference.Predictor` only, so an ONNX export is served without PyTorch. In a program of your own:

    uvicorn.run(maple.serve.api.create_app(load_predictor("runs/food"), token="a-secret-of-16-characters"))

`maple serve` does the same, with protection against slow clients (see `maple.serve.listen`).
"""
