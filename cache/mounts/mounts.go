// Package mounts makes blobs of what RUN --mount=type=cache keeps in a directory, and such a directory of the blobs.
//
// An archive is a list and packs, all of them layers (a tar, compressed with zstd) so that any registry takes them.
// The list has one file, files.json: every path with its attributes, and which pack has the content. A pack holds
// contents, each under its digest. An archive that follows on another takes over the packs of that one of which at
// least half is still in use; only what is new goes into new ones. So a change of two percent uploads two percent.
//
// Regular files, directories, symbolic and hard links travel, with mode, owner and time; sockets, pipes, devices and
// extended attributes do not. It never writes outside the directory it is given, knows no key, and asks no network.
//
// Start at [Pack]. list.go has the list and what of one is believed, pack.go reads a directory, unpack.go writes one.
package mounts

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Part is one blob of an archive.
type Part struct {
	DiffID digest.Digest
	Blob   ocispec.Descriptor // media type, digest and size
}

// Archive is the content of a directory as blobs.
type Archive struct {
	Parts []Part // the list, then the packs
	Bytes int64  // of the files

	made map[digest.Digest]string // where the new ones are, by digest of the blob
}

// Open opens a blob that [Pack] made. One that was there before is an error that wraps [ErrOld].
func (a *Archive) Open(blob digest.Digest) (io.ReadCloser, error) {
	at, ok := a.made[blob]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", blob, ErrOld)
	}
	return os.Open(at)
}

// ErrOld says that a blob is one of an older archive, which has it.
var ErrOld = errors.New("it was made for an older archive")

// TooLargeError says that a directory holds more than it may.
type TooLargeError struct{ Bytes int64 }

func (e *TooLargeError) Error() string { return fmt.Sprintf("%d bytes are too many", e.Bytes) }

// partWriter writes one blob.
type partWriter struct {
	*tar.Writer
	file       *os.File
	zstd       *zstd.Encoder
	blob, diff hash.Hash
}

func newPart(temp string) (*partWriter, error) {
	f, err := os.CreateTemp(temp, "part-")
	if err != nil {
		return nil, err
	}
	w := &partWriter{file: f, blob: sha256.New(), diff: sha256.New()}
	if w.zstd, err = zstd.NewWriter(io.MultiWriter(f, w.blob)); err != nil {
		f.Close()
		return nil, err
	}
	w.Writer = tar.NewWriter(io.MultiWriter(w.zstd, w.diff))
	return w, nil
}

// finish ends the blob and returns it with where it is.
func (w *partWriter) finish() (Part, string, error) {
	err := errors.Join(w.Writer.Close(), w.zstd.Close())
	size, serr := w.file.Seek(0, io.SeekCurrent)
	if err = errors.Join(err, serr, w.file.Close()); err != nil {
		return Part{}, "", err
	}
	return Part{
		DiffID: digest.NewDigest(digest.SHA256, w.diff),
		Blob:   ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: digest.NewDigest(digest.SHA256, w.blob), Size: size},
	}, filepath.Clean(w.file.Name()), nil
}

// abort throws the blob away.
func (w *partWriter) abort() {
	w.zstd.Close()
	w.file.Close()
	_ = os.Remove(w.file.Name()) // the directory it is in goes as well
}

// maxWindow bounds the memory that a foreign blob makes its reader take.
const maxWindow = 128 << 20

// readPart calls do for each file of a blob, which may unpack to so many bytes, and verifies the blob.
func readPart(body io.Reader, p Part, most int64, do func(h *tar.Header, content io.Reader) error) error {
	sum := sha256.New()
	in := io.TeeReader(io.LimitReader(body, p.Blob.Size+1), sum)
	z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return err
	}
	defer z.Close()
	all := &io.LimitedReader{R: z, N: most}
	err = eachFile(tar.NewReader(all), func(h *tar.Header, content io.Reader) error {
		if h.Size > all.N { // a tar can say that there are holes, which take no bytes of it
			return errTooLarge
		}
		return do(h, content)
	})
	if all.N == 0 {
		err = errTooLarge
	}
	if _, end := io.Copy(io.Discard, in); err == nil {
		err = end
	}
	if got := digest.NewDigest(digest.SHA256, sum); err == nil && got != p.Blob.Digest {
		err = fmt.Errorf("it has digest %s", got)
	}
	if err != nil {
		return fmt.Errorf("blob %s: %w", p.Blob.Digest, err)
	}
	return nil
}

var errTooLarge = errors.New("unpacks to more than it should")

func eachFile(r *tar.Reader, do func(h *tar.Header, content io.Reader) error) error {
	for {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = do(h, r)
		}
		if err != nil {
			return err
		}
	}
}
