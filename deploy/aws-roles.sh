#!/usr/bin/env bash
# Makes the two instance profiles of cluster.yaml, once for each account, and lets them use a bucket, once for each bucket;
# it needs AWS's command line and permission for IAM. Machines then read and write the bucket without a key in any file.
# After a failure, run it again: what is there stays.
#
#   deploy/aws-roles.sh BUCKET
set -euo pipefail

bucket=${1:?"say which bucket holds the workspaces"}
account=$(aws sts get-caller-identity --query Account --output text)
trust='{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole",
  "Principal": {"Service": "ec2.amazonaws.com"}}]}'
objects="{\"Version\": \"2012-10-17\", \"Statement\": [
  {\"Effect\": \"Allow\", \"Action\": [\"s3:ListBucket\", \"s3:ListBucketMultipartUploads\"],
   \"Resource\": \"arn:aws:s3:::$bucket\"},
  {\"Effect\": \"Allow\", \"Resource\": \"arn:aws:s3:::$bucket/*\",
   \"Action\": [\"s3:GetObject\", \"s3:PutObject\", \"s3:DeleteObject\", \"s3:AbortMultipartUpload\"]}]}"
pass="{\"Version\": \"2012-10-17\", \"Statement\": [{\"Effect\": \"Allow\", \"Action\": \"iam:PassRole\",
  \"Resource\": \"arn:aws:iam::$account:role/unclip-workspace\"}]}"

for role in unclip-workspace unclip-head; do
    aws iam get-role --role-name "$role" >/dev/null 2>&1 ||
        aws iam create-role --role-name "$role" --assume-role-policy-document "$trust"
    aws iam put-role-policy --role-name "$role" --policy-name "bucket-$bucket" --policy-document "$objects"
    aws iam get-instance-profile --instance-profile-name "$role" >/dev/null 2>&1 ||
        aws iam create-instance-profile --instance-profile-name "$role"
    held=$(aws iam get-instance-profile --instance-profile-name "$role" --query "InstanceProfile.Roles[].RoleName" --output text)
    [[ $held == "$role" ]] || aws iam add-role-to-instance-profile --instance-profile-name "$role" --role-name "$role"
done
# The head starts the other machines, gives them their role, and looks up their image.
aws iam put-role-policy --role-name unclip-head --policy-name pass-role --policy-document "$pass"
for policy in AmazonEC2FullAccess AmazonSSMReadOnlyAccess; do
    aws iam attach-role-policy --role-name unclip-head --policy-arn "arn:aws:iam::aws:policy/$policy"
done
