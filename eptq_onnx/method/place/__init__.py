"""Choose by measured time which parts of a network run on integers and which stay float.

The network is cut into regions of nodes that a runtime computes together (`regions`). Each region is timed
alone, in float and on integers, and so are the conversions between number formats and memory layouts
(`pieces`). An integer program (`program`) chooses the form of each region that minimizes the total time
(`costs`, `network`). These times miss interactions between kernels, such as cache hits, so whole models are
compared before a choice is taken.
"""
