"""Programs: reading a jaxpr, following weights through it, and running it on weights that are not multiplied out.

Read the files in this order: `jaxpr` (all that touches jaxprs), `views` and `factored` (a weight on its way, as axes
and as numbers), `moves` (what operations do to both), `notes`, `walk` and `reading` (programs that are followed), and
`run` (programs that are run).
"""
