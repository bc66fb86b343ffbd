"""Importers: public benchmarks in their own layouts on disk, made into episodes. One file a benchmark; `driver` runs them."""
