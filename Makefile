# Thin names over the programs in scripts, which do the work and explain themselves with --help.
#
#   make run ARGS='--fresh'
#   make test ARGS='--quick'
#   make bench NAME=chat ARGS='--connections 20000'
.PHONY: all run test bench

NAME ?= storm
ARGS ?=

all:
	cargo build --release --locked --workspace --bins

run:
	scripts/run $(ARGS)

test:
	scripts/test $(ARGS)

bench:
	scripts/bench $(NAME) $(ARGS)
