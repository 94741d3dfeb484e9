"""The demo's own captioned pictures of one or two plain shapes, and a check that reads pixels without any network."""
