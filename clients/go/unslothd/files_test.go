package unslothd_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"google.golang.org/grpc"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
	"github.com/unslothd/unslothd/clients/go/unslothd"
)

const fileName = "sub/model.bin"

func (s *script) DownloadArtifact(
	request *pb.DownloadArtifactRequest, stream grpc.ServerStreamingServer[pb.DownloadArtifactResponse],
) error {
	name := fileName
	if len(request.GetNames()) > 0 {
		name = request.GetNames()[0]
	}
	digest := sha256.Sum256(s.file)
	file := &pb.ArtifactFile{Name: name, NumBytes: int64(len(s.file)), Sha256: hex.EncodeToString(digest[:])}
	if err := stream.Send(&pb.DownloadArtifactResponse{Part: &pb.DownloadArtifactResponse_File{File: file}}); err != nil {
		return err
	}
	if request.GetHeadersOnly() {
		return nil
	}
	s.offsets = append(s.offsets, request.GetOffset())
	rest, end := s.file[request.GetOffset():], error(nil)
	if s.breakAt > 0 && len(rest) > s.breakAt {
		rest, end = rest[:s.breakAt], lost
	}
	for chunk := range slices.Chunk(rest, 1000) {
		part := &pb.DownloadArtifactResponse_Chunk{Chunk: chunk}
		if err := stream.Send(&pb.DownloadArtifactResponse{Part: part}); err != nil {
			return err
		}
	}
	return end
}

func (s *script) UploadDataset(stream grpc.ClientStreamingServer[pb.UploadDatasetRequest, pb.UploadDatasetResponse]) error {
	for {
		message, err := stream.Recv()
		if err != nil {
			break
		}
		if header := message.GetHeader(); header != nil {
			s.stored, s.file = header, nil
		}
		s.file = append(s.file, message.GetChunk()...)
	}
	if s.breakAt > 0 {
		s.breakAt = 0
		return lost
	}
	dataset := &pb.Dataset{DatasetId: "sha256:" + s.stored.GetSha256(), NumBytes: int64(len(s.file))}
	return stream.SendAndClose(&pb.UploadDatasetResponse{Dataset: dataset})
}

func artifact() *pb.DownloadArtifactRequest {
	return &pb.DownloadArtifactRequest{Source: &pb.DownloadArtifactRequest_ArtifactId{ArtifactId: "a"}}
}

func TestABrokenDownloadGoesOnWhereItStopped(t *testing.T) {
	s := &script{file: bytes.Repeat([]byte("0123456789"), 1000), breakAt: 4000}
	folder := t.TempDir()
	var seen []int64
	paths, err := serve(t, s).Download(bounded(t), artifact(), folder, unslothd.DownloadOptions{
		OnProgress: func(progress unslothd.DownloadProgress) { seen = append(seen, progress.Done) },
	})
	must(t, err)
	got, err := os.ReadFile(paths[0])
	must(t, err)
	if !bytes.Equal(got, s.file) || !slices.Equal(s.offsets, []int64{0, 4000, 8000}) || !slices.IsSorted(seen) {
		t.Fatal(paths, s.offsets, seen)
	}
	s.offsets = nil
	if _, err := serve(t, s).Download(bounded(t), artifact(), folder, unslothd.DownloadOptions{}); err != nil {
		t.Fatal("what is here already must be enough:", err)
	}
}

func TestBytesOfAnotherFileAreTakenAgain(t *testing.T) {
	s := &script{file: []byte("the right bytes")}
	folder := t.TempDir()
	must(t, os.Mkdir(filepath.Join(folder, "sub"), 0o700))
	must(t, os.WriteFile(filepath.Join(folder, fileName+".part"), []byte("wrong"), 0o600))
	paths, err := serve(t, s).Download(bounded(t), artifact(), folder, unslothd.DownloadOptions{})
	must(t, err)
	if got, _ := os.ReadFile(paths[0]); !bytes.Equal(got, s.file) {
		t.Fatalf("%q", got)
	}
}

func TestAnotherFileOfTheSameNameIsKeptUnlessToldOtherwise(t *testing.T) {
	s := &script{file: []byte("new")}
	folder := t.TempDir()
	must(t, os.Mkdir(filepath.Join(folder, "sub"), 0o700))
	must(t, os.WriteFile(filepath.Join(folder, fileName), []byte("old"), 0o600))
	client := serve(t, s)
	if _, err := client.Download(bounded(t), artifact(), folder, unslothd.DownloadOptions{}); !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	_, err := client.Download(bounded(t), artifact(), folder, unslothd.DownloadOptions{Overwrite: true})
	must(t, err)
}

func TestNothingIsWrittenOutsideOfTheFolder(t *testing.T) {
	s := &script{file: []byte("evil")}
	outside, folder := t.TempDir(), t.TempDir()
	must(t, os.Symlink(outside, filepath.Join(folder, "sub")))
	for _, name := range []string{"../x", "/x", "a/../../x", `a\..\x`, "C:x", "", ".", fileName} {
		request := artifact()
		request.Names = []string{name}
		if _, err := serve(t, s).Download(bounded(t), request, folder, unslothd.DownloadOptions{}); err == nil {
			t.Errorf("%q was accepted", name)
		}
	}
	if found, _ := os.ReadDir(outside); len(found) > 0 {
		t.Fatal(found)
	}
}

func TestAnUploadIsHashedAndSentAgainAfterALostConnection(t *testing.T) {
	rows := bytes.Repeat([]byte(`{"text": "a row"}`+"\n"), 100_000)
	s := &script{breakAt: 1}
	var last unslothd.UploadProgress
	header := &pb.UploadDatasetHeader{Name: "rows", Format: pb.DataFormat_DATA_FORMAT_JSONL}
	dataset, err := serve(t, s).UploadDataset(bounded(t), bytes.NewReader(rows), header,
		func(progress unslothd.UploadProgress) { last = progress })
	must(t, err)
	digest := sha256.Sum256(rows)
	if dataset.GetDatasetId() != "sha256:"+hex.EncodeToString(digest[:]) || !bytes.Equal(s.file, rows) {
		t.Fatal(dataset)
	}
	if last.Done != int64(len(rows)) || last.Total != last.Done {
		t.Fatal(last)
	}
}
