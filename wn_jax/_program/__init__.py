"""Programs: reading a jaxpr, following weights through it, and running it on weights that are not multiplied out.

Read the files in this order: `jaxpr` (all that touches jaxprs), `views` and `factored` (a weight on its way, as axes
and as numbers), `moves` with its rules in `cuts`, and `products` (what operations do to both), `contractions`; then
programs that are followed: `notes`, `facts` and `repeats` (what is known of other values), `values`, `dead_code`,
`walk` and `reading`; and programs that are run: `run` and `strict`.
"""
