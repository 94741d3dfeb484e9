"""The project's own captioned pictures: one or two plain shapes, and a check on pixels that knows no network."""
