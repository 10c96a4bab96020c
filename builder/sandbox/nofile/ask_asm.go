//go:build amd64 || arm64

package nofile

// ask is prlimit64(2).
//
//go:noescape
func ask(limit *[2]uint64)
