//go:build 386 || arm

package sandbox

import "golang.org/x/sys/unix"

// Here the calls without a number in their name take IDs of 16 bits.
const (
	sysSetgroups = unix.SYS_SETGROUPS32
	sysSetresgid = unix.SYS_SETRESGID32
	sysSetresuid = unix.SYS_SETRESUID32
)
