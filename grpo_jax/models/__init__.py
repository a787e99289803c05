"""Models: the only folder that imports Flax. Everyone else holds a static ``Model`` and an opaque ``Params`` pytree."""
