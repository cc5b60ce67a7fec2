"""The embedded demo model: a small real GIT, trained from scratch on composed scenes.

It exists so that serving, testing and trying Vignette needs no download. Nothing outside this
folder imports it; what it produces (`demo/model/`, `engines/demo/`, `demo/samples/`) is committed.

Reading order: `nouns` -> `grammar` (what a scene says) -> `sprites` -> `render` (what it looks
like) -> `model` -> `train` -> `evaluate`, `samples`.
"""
