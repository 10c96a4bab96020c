//go:build !386 && !arm

package sandbox

import "golang.org/x/sys/unix"

// The calls that change IDs; their numbers differ on old architectures of 32 bits.
const (
	sysSetgroups = unix.SYS_SETGROUPS
	sysSetresgid = unix.SYS_SETRESGID
	sysSetresuid = unix.SYS_SETRESUID
)
