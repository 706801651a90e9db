# The image of leasehold: `make image`. It holds the binary and the certificates of the public
# authorities, and nothing else.

# The compiler runs on the build's own architecture and builds for the image's: nothing is emulated.
FROM --platform=$BUILDPLATFORM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETARCH
ARG VERSION=unknown
ARG COMMIT=unknown
ARG DATE=unknown
RUN GOARCH=$TARGETARCH make build VERSION="$VERSION" COMMIT="$COMMIT" DATE="$DATE"

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /src/leasehold /leasehold
ARG VERSION=unknown
ARG COMMIT=unknown
ARG DATE=unknown
LABEL org.opencontainers.image.title="leasehold" \
      org.opencontainers.image.description="Keeps a job running on exactly one machine, by an election in etcd" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT" \
      org.opencontainers.image.created="$DATE"
# A number, so that Kubernetes sees that it is not root. There is no passwd file to resolve a name.
USER 65532:65532
ENTRYPOINT ["/leasehold"]
