"""Engines that compile and run a graph, each in a process of its own."""
