"""Choose by time which parts of a network run on integers and which stay float.

The network is cut into regions, the nodes that a runtime computes together (`regions`). Each is timed alone
in both forms, and so are the conversions between forms and layouts (`pieces`). An integer program (`program`)
chooses the form of each region so that the total is least (`costs`, `network`). What these times do not tell,
such as what stays in a cache, is left to a comparison of whole models.
"""
