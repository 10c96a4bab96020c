package layer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"io/fs"
	"os"

	"github.com/opencontainers/go-digest"
)

// A layer that no RUN is on, as the last ones of most images, has no tree: were its blob damaged, it could be made from
// nothing but the files of a build that may never come again. Nor can a foreign one be made from its tree, and its registry
// may be gone. Their blobs get a parity file while they are written, of 64 KiB and a thousandth: a checksum for each block,
// and for each of 16 rows of blocks, dealt out in turn, their exclusive or. From it any one block a row is restored: what a
// disk loses at one place, and a blob of at most 64 KiB whole.
const (
	parityMagic = "filo parity 1\n\x00\x00"
	parityBlock = 4 << 10
	parityRows  = 16
)

// parity is that of a blob so far.
type parity struct {
	size int64
	sums []byte // CRC-32C of each block
	rows [parityRows][parityBlock]byte
	crc  uint32 // of the block that is not full yet
}

// Write takes bytes of the blob in their order. It never fails.
func (p *parity) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		at := int(p.size % parityBlock)
		n := min(len(rest), parityBlock-at)
		row := p.rows[p.size/parityBlock%parityRows][at : at+n]
		subtle.XORBytes(row, row, rest[:n])
		p.crc = crc32.Update(p.crc, castagnoli, rest[:n])
		p.size += int64(n)
		if at+n == parityBlock {
			p.endBlock()
		}
		rest = rest[n:]
	}
	return len(b), nil
}

func (p *parity) endBlock() {
	p.sums = binary.LittleEndian.AppendUint32(p.sums, p.crc)
	p.crc = 0
}

// encode ends the blob and returns its parity as a file.
func (p *parity) encode() []byte {
	if p.size%parityBlock > 0 {
		p.endBlock()
	}
	b := append([]byte(parityMagic), p.sums...)
	for i := range min(parityRows, len(p.sums)/4) {
		b = append(b, p.rows[i][:]...)
	}
	b = binary.LittleEndian.AppendUint64(b, uint64(p.size))
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

// decodeParity is the reverse of encode; nil if the file is damaged.
func decodeParity(b []byte) *parity {
	const tail = 8 + 4
	if len(b) < len(parityMagic)+tail || crc32.Checksum(b[:len(b)-4], castagnoli) != binary.LittleEndian.Uint32(b[len(b)-4:]) {
		return nil
	}
	p := &parity{size: int64(binary.LittleEndian.Uint64(b[len(b)-tail:]))}
	blocks := (p.size + parityBlock - 1) / parityBlock
	rows := min(parityRows, blocks)
	body, ok := bytes.CutPrefix(b[:len(b)-tail], []byte(parityMagic))
	if !ok || p.size < 0 || int64(len(body)) != 4*blocks+parityBlock*rows {
		return nil
	}
	p.sums = body[:4*blocks]
	for i := range rows {
		copy(p.rows[i][:], body[4*blocks+parityBlock*i:])
	}
	return p
}

// mend writes to out what in, of any length, should be. It is an error if more is wrong than one block a row.
func (p *parity) mend(in io.ReaderAt, out io.Writer) error {
	wrong := [parityRows]int64{}
	for i := range wrong {
		wrong[i] = -1
	}
	rows := p.rows // becomes what the wrong blocks should be
	buf := make([]byte, parityBlock)
	for i := range int64(len(p.sums) / 4) {
		block, row := p.block(in, i, buf), i%parityRows
		switch {
		case block != nil:
			subtle.XORBytes(rows[row][:], rows[row][:], block)
		case wrong[row] >= 0:
			return errors.New("too much is wrong")
		default:
			wrong[row] = i
		}
	}
	for i := range int64(len(p.sums) / 4) {
		block := p.block(in, i, buf)
		if block == nil {
			if wrong[i%parityRows] != i {
				return errors.New("changes while it is read")
			}
			block = rows[i%parityRows][:p.length(i)]
		}
		if _, err := out.Write(block); err != nil {
			return err
		}
	}
	return nil
}

// block reads a block; nil if it is not what it should be.
func (p *parity) block(in io.ReaderAt, i int64, buf []byte) []byte {
	buf = buf[:p.length(i)]
	n, _ := in.ReadAt(buf, i*parityBlock)
	if n < len(buf) || crc32.Checksum(buf, castagnoli) != binary.LittleEndian.Uint32(p.sums[4*i:]) {
		return nil
	}
	return buf
}

// length is how long a block is: all but the last are full.
func (p *parity) length(i int64) int64 { return min(parityBlock, p.size-i*parityBlock) }

func (s *Store) parityPath(d digest.Digest) string { return s.copyPath(d) + paritySuffix }

const paritySuffix = ".parity"

func (s *Store) putParity(d digest.Digest, p *parity) error {
	if was, err := os.ReadFile(s.parityPath(d)); err == nil && decodeParity(was) != nil {
		return nil // that may have reached the disk already
	}
	return s.putFile(s.parityPath(d), p.encode())
}

// mendBlob makes a blob right by its parity, and says whether that was possible.
func (s *Store) mendBlob(ctx context.Context, d digest.Digest) bool {
	data, err := os.ReadFile(s.parityPath(d))
	if err != nil {
		return false
	}
	p := decodeParity(data)
	if p == nil {
		return false
	}
	var in io.ReaderAt = bytes.NewReader(nil)
	if f, err := os.Open(s.blobPath(d)); err == nil {
		defer f.Close()
		in = f
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false
	}
	out, err := os.CreateTemp(s.tmp, "mended-")
	if err != nil {
		return false
	}
	defer os.Remove(out.Name()) // unless it was moved
	sum := sha256.New()
	err = p.mend(in, io.MultiWriter(out, sum))
	if err := errors.Join(err, out.Chmod(0o644), out.Close()); err != nil || digest.NewDigest(digest.SHA256, sum) != d {
		return false
	}
	s.stamp(out.Name())
	if os.Rename(out.Name(), s.blobPath(d)) != nil {
		return false
	}
	_ = s.settle(ctx, s.blobPath(d)) // else it is damaged again after a power cut, and mended again
	return true
}
