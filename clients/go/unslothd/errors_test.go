package unslothd_test

import (
	"errors"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	pb "github.com/unslothd/unslothd/clients/go/gen/unslothd/v1"
	"github.com/unslothd/unslothd/clients/go/unslothd"
)

func TestAnErrorTellsReasonFieldsFiguresAndWhenToTryAgain(t *testing.T) {
	refused := refusal(codes.InvalidArgument, "INVALID_FIELD", map[string]string{"model_id": "is empty"})
	_, err := serve(t, &script{turns: []turn{{nil, refused}}}).Train(bounded(t), &pb.TrainRequest{})
	if !errors.Is(err, unslothd.InvalidRequest) || !errors.Is(err, unslothd.ReasonInvalidField) ||
		errors.Is(err, unslothd.NotFound) || errors.Is(err, unslothd.ReasonModelBusy) {
		t.Fatal(err)
	}
	var failure *unslothd.Error
	if !errors.As(err, &failure) {
		t.Fatal(err)
	}
	if failure.FieldViolations[0] != (unslothd.FieldViolation{Field: "model_id", Description: "is empty"}) ||
		failure.Metadata["needed_bytes"] != "7" || failure.RetryAfter != 3*time.Second || failure.Message != "no" {
		t.Fatalf("%#v", failure)
	}
}

func TestACallThatGetsNoAnswerEndsAtItsTimeout(t *testing.T) {
	client := serve(t, &script{}, unslothd.WithTimeout(100*time.Millisecond))
	if _, err := client.GetModel(bounded(t), "m"); !errors.Is(err, unslothd.DeadlineExceeded) {
		t.Fatal(err)
	}
}

func TestATargetWhereNobodyListensIsToldAtOnce(t *testing.T) {
	client, err := unslothd.New("127.0.0.1:1")
	must(t, err)
	defer client.Close()
	_, err = client.ServerInfo(bounded(t))
	if !errors.Is(err, unslothd.Unavailable) || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Fatal(err)
	}
}

func TestATokenIsSentAndNeverInPlainTextToAnotherHost(t *testing.T) {
	s := &script{turns: []turn{{steps(1), nil}}}
	_, err := serve(t, s, unslothd.WithToken("secret")).Train(bounded(t), &pb.TrainRequest{})
	must(t, err)
	if got := s.headers.Get("authorization"); len(got) != 1 || got[0] != "Bearer secret" {
		t.Fatal(got)
	}
	if _, err := unslothd.New("gpu.example:50051", unslothd.WithToken("secret")); err == nil {
		t.Fatal("a token in plain text to another host must be refused")
	}
}

func TestTheReasonsAreThoseOfTheContract(t *testing.T) {
	source, err := os.ReadFile("reasons.go")
	must(t, err)
	named := map[string]bool{}
	for _, match := range regexp.MustCompile(`Reason = "([A-Z_]+)"`).FindAllSubmatch(source, -1) {
		named[string(match[1])] = true
	}
	for number, name := range pb.ErrorReason_name {
		if short := strings.TrimPrefix(name, "ERROR_REASON_"); number != 0 && !named[short] {
			t.Errorf("%s has no constant in reasons.go", short)
		}
	}
	if len(named) != len(pb.ErrorReason_name)-1 {
		t.Errorf("reasons.go has %d reasons, the contract %d", len(named), len(pb.ErrorReason_name)-1)
	}
}
