"""What all tests share: generators of inputs, oracles made without mixlens, and readers of what is displayed.

One file is one thing. Tests reach private parts of mixlens only through `helpers.inside`, so that a file that moves
changes one import here.
"""
