"""Data that models are trained and measured on. Beside :mod:`titans_graph.training`; knows nothing of the compiler."""
