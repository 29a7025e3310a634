# Builds the server for CPU. For GPUs give as RUNTIME an image that carries NVRTC, cuBLAS and NCCL, and a glibc no older
# than the build stage's.
ARG RUNTIME=debian:bookworm-slim

FROM rust:1.95.0-bookworm AS build
# The image's own toolchain, as it is: without the components that rust-toolchain.toml adds for development.
ENV RUSTUP_TOOLCHAIN=1.95.0
WORKDIR /source
COPY . .
RUN cargo build --release --locked --package lockstep && strip target/release/lockstep

FROM ${RUNTIME}
RUN groupadd --gid 10001 lockstep && useradd --uid 10001 --gid 10001 --no-create-home lockstep
COPY --from=build /source/target/release/lockstep /usr/local/bin/lockstep
COPY --from=build /source/LICENSE /source/NOTICE /usr/share/doc/lockstep/
USER 10001:10001
EXPOSE 8470
ENTRYPOINT ["lockstep"]
CMD ["--help"]
