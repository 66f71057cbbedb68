# Base image of the build stage: the toolchain of go.mod's minor version.
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
# What -version and the log tell of the build: the context has no .git.
ARG VERSION=unknown
RUN CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$VERSION" -o /out/session-storage . \
	&& mkdir /out/volume && mkdir -m 0770 /out/volume/data

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/
COPY --from=build /out/session-storage /session-storage
# COPY keeps the mode of what is in a directory, not of the directory itself: hence volume/data. It is of group 0, as
# some platforms (OpenShift) run each container as a user of its own in that group.
COPY --from=build --chown=65532:0 /out/volume/ /
USER 65532:65532
ENV DB_PATH=/data/users.db
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=6s --start-period=2s CMD ["/session-storage", "-healthcheck"]
ENTRYPOINT ["/session-storage"]
