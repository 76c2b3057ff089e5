"""The one border for what strangers send.

In: JSON and base64 from a message. Out: `Text`, `ImageBytes`, `Pair`, `PreparedText`, or `InvalidInputError`. Behind
it, no string or dictionary of a message reaches a library as it came.
"""
