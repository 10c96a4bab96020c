//go:build !amd64 && !arm64

package nofile

func ask(*[2]uint64) {}
