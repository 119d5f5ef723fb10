# Thin names over scripts/, which do the work and explain themselves with --help.
.PHONY: all run test bench

NAME ?= storm

all:
	cargo build --release --locked --workspace --bins

run:
	scripts/run --services

test:
	scripts/test

# make bench NAME=chat
bench:
	scripts/bench $(NAME)
