# syntax=docker/dockerfile:1
# A small image without a shell, run by nobody in particular:
#   docker build -t tidegate .
#   docker run --rm -p 127.0.0.1:8080:8080 -v "$PWD/tidegate.toml:/etc/tidegate/tidegate.toml:ro" \
#     -e TIDEGATE_CONFIG=/etc/tidegate/tidegate.toml tidegate

FROM rust:1.95-slim-bookworm AS build
WORKDIR /src
# For jemalloc.
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
# The dependencies are a layer of their own, which only Cargo.toml and Cargo.lock renew.
COPY Cargo.toml Cargo.lock ./
COPY .cargo .cargo
RUN mkdir -p src benches/fanout \
    && echo 'fn main() {}' > src/main.rs \
    && cp src/main.rs benches/fanout/main.rs \
    && touch src/lib.rs \
    && cargo build --release --locked
COPY nats/stream.json nats/
COPY web web
COPY src src
# Newer than what stood in their place.
RUN touch src/main.rs src/lib.rs && cargo build --release --locked

# glibc, roots of trust, a user, and nothing else. No HEALTHCHECK: there is no program here to make the request with. Ask
# /health/ready on the admin listener from outside, as deploy/kubernetes does.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /src/target/release/tidegate /usr/local/bin/tidegate
ENV TIDEGATE_LISTEN=0.0.0.0:8080 \
    TIDEGATE_ADMIN_LISTEN=0.0.0.0:9090
EXPOSE 8080 9090
ENTRYPOINT ["/usr/local/bin/tidegate"]
